"""Models: in which number format they compute, how they are loaded, what they compute and weigh."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from unittest import mock

# oneDNN keeps what it prepares for each width of a batch, by default for 1,024: with 64, task 1's training on
# a CPU peaks at 4.2 GiB instead of 5.5 and a step takes 1.29 s instead of 1.33. It is read at the first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import bitsandbytes as bnb
import psutil
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from pipeline import checks, runner
from sources import pretrained

# cuDNN's attention returns NaN gradients for masked batches of certain widths (64, 192, ... columns: pytorch
# issue 196678), and PyTorch prefers it on recent GPUs: step 80 of a run on an H200 turned every weight into
# NaN. The other fused kernels are right.
torch.backends.cuda.enable_cudnn_sdp(False)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# -------------------------------------------------------------------------------- device and number format

def device() -> torch.device:
    """The accelerator of this process, else the CPU.

    A CUDA or ROCm card, of which torchrun gives each process one (LOCAL_RANK), or Apple's GPU.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def native_dtype(kind: str) -> str:
    """The fastest of "bf16", "fp16" and "fp32" that device type `kind` computes in hardware.

    bf16 on NVIDIA from Ampere on, on CPUs with AVX512-BF16, AMX or Arm's BF16, on Apple's GPUs from macOS 14
    on. fp16 on older NVIDIA cards (T4, V100), whose bf16 is emulated. fp32 elsewhere: with AVX2 alone a
    training step of 4 rows took 38.6 s in NF4 with bf16 and 2.7 s with fp32 (2 cores).
    """
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if kind == "mps":
        return "bf16" if torch.backends.mps.is_macos_or_newer(14, 0) else "fp32"
    # This one obeys ONEDNN_MAX_CPU_ISA; on x86 it is also true where bf16 is emulated.
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if platform.machine().lower() in ("x86_64", "amd64"):
        bf16 = bf16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if bf16 else "fp32"


@functools.cache
def compute_name(asked: str = "auto") -> str:
    """The knob `compute` as "bf16", "fp16" or "fp32", printed once; "auto" is `native_dtype`.

    SystemExit for fp16 on a CPU, and for "auto" if earlier steps of the run computed in another format.
    """
    kind = device().type
    name = native_dtype(kind) if asked == "auto" else asked
    if (name, kind) == ("fp16", "cpu"):
        raise SystemExit("fp16: PyTorch trains in fp16 on GPUs only; a CPU takes bf16 or fp32")
    before = runner.UPSTREAM.get("compute", name)
    if asked == "auto" and before != name:
        raise SystemExit(f"earlier steps of this run computed in {before}, this machine would in {name}: "
                         f"SET=compute={before}, or another RUN=")
    runner.FACTS |= {"compute": name, "threads": torch.get_num_threads()}  # runner.environment stores them
    reason = "what the hardware has" if asked == "auto" else "as asked"
    print(f"  compute={name} on {kind} ({reason})", flush=True)
    return name


def arithmetic(precision: str, compute: str) -> str:
    """The number format in which weights of `precision` compute: `compute` for 4 bits, else their own."""
    if precision in ("bf16", "fp32"):
        return precision
    return compute_name(compute if precision == "nf4" else precision)


def autocast(name: str):
    """A context that computes in `name`, as the Trainer does; it does nothing for fp32."""
    return torch.autocast(device().type, DTYPES[name], enabled=name != "fp32")


def label(precision: str) -> str:
    """How tables name a precision: "NF4", "bf16", ..."""
    return "NF4" if precision == "nf4" else precision


def free_memory(cap_gib: float = 0) -> int:
    """Bytes that this process may still take: of the card, or of the machine for a CPU or Apple's GPU.

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


# ------------------------------------------------------------------------------------- how they are loaded

def load_tokenizer(name: str):
    """Tokenizer that pads on the left, with a token other than EOS where the vocabulary has one to spare.

    With pad == eos a collator that masks by token id would hide every EOS from the loss, and the model would
    never learn to stop. SystemExit if there is no EOS token.
    """
    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve(name))
    eos = tokenizer.eos_token_id
    if eos is None:
        raise SystemExit(f"MODEL={name}: its tokenizer has no EOS token, so no answer could end")
    if tokenizer.pad_token_id in (None, eos):
        spare = tokenizer.unk_token_id not in (None, eos)
        tokenizer.pad_token = tokenizer.unk_token if spare else tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def first_ids(tokenizer) -> list[int]:
    """Ids that this tokenizer puts before a text (mostly BOS): what the model saw before every text."""
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    return whole[:next((i for i in range(len(whole)) if whole[i:i + len(plain)] == plain), 0)]


def nf4(compute: str, double_quant: bool, skip: list[str] | None = None) -> BitsAndBytesConfig:
    """QLoRA's storage: NormalFloat4 in blocks of 64, computed in `compute` (Dettmers et al. 2023).

    TypeError if `double_quant` is None: nothing is left to a default in which two steps could differ.
    """
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip,
                              bnb_4bit_use_double_quant=double_quant,
                              bnb_4bit_compute_dtype=DTYPES[compute_name(compute)])


def load_decoder(name: str, precision: str, compute: str = "auto", double_quant: bool | None = None):
    """A causal language model in eval mode, on the accelerator if any.

    `precision` "nf4" is QLoRA's 4 bits, see `nf4` for the other two arguments; "bf16", "fp16" and "fp32" are
    unquantised weights. SystemExit for a model whose layers keep a state that cannot be rewound (Mamba).
    """
    where, folder = device(), pretrained.resolve(name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=DTYPES[arithmetic(precision, compute)],
        quantization_config=nf4(compute, double_quant) if precision == "nf4" else None,
        attn_implementation=attention(AutoConfig.from_pretrained(folder, trust_remote_code=False)),
        device_map={"": where} if where.type != "cpu" else None)
    if getattr(model, "_is_stateful", False):
        raise SystemExit(f"MODEL={name}: {type(model).__name__} keeps a recurrent state; prompts are read "
                         "once here and continued several times, which needs attention layers only")
    # With logits_to_keep=k the hidden states are a slice, for which torch on a CPU expands and copies the
    # head's matrix once per row of the batch: 1.7 s of a 6.5 s training step (16 rows, vocabulary of 49k).
    model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return keep_gradients(model).eval()


def attention(config) -> str | None:
    """The attention kernel: the plain one on CPUs and for models that cap attention scores, else None.

    None is the library's choice, which is PyTorch's fused kernel where the model has it. For rows of about
    130 tokens the CPU's fused bf16 forward took 32 ms a layer and the plain one 7 (a training step of 16 rows
    5.1 s and 4.5 s). The fused kernel knows no cap (Gemma 2), and would leave it out silently.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if device().type == "cpu" or capped else None


def load_encoder(name: str, precision: str, compute: str = "auto", double_quant: bool | None = None,
                 max_tokens: int | None = None, prompts: dict[str, str] | None = None):
    """A SentenceTransformer in eval mode, on the accelerator if any; see `load_decoder` for the precision.

    The pooler stays out of the 4 bits: mean-pooled models never use it. `max_tokens` cuts longer texts;
    SystemExit if it is above what the model was made for. `prompts` replaces {"query": text, "document":
    text}. Attention is the plain one on a CPU, where a step of 64 x 128 tokens took 2.6 s and fused 4.0 s,
    and the library's choice elsewhere.
    """
    from sentence_transformers import SentenceTransformer  # here: it takes seconds, and task 1 does without
    where = device()
    folder = pretrained.resolve(name, pretrained.ENCODERS)
    model = SentenceTransformer(folder, device=str(where), model_kwargs={
        "dtype": DTYPES[arithmetic(precision, compute)],
        "quantization_config": nf4(compute, double_quant, ["pooler"]) if precision == "nf4" else None,
        "attn_implementation": "eager" if where.type == "cpu" else None})
    limit = model.max_seq_length
    if max_tokens and limit and max_tokens > limit:
        raise SystemExit(f"max_tokens={max_tokens}: {name} reads at most {limit} tokens; "
                         f"SET=max_tokens={limit} or less")
    model.max_seq_length = max_tokens or limit
    own = model.prompts  # "document" is empty in an older model, which says "passage" or "corpus"
    document = own.get("document") or own.get("passage") or own.get("corpus") or ""
    model.prompts = {"query": own.get("query") or "", "document": document, **(prompts or {})}
    model[0].model.name_or_path = pretrained.public_name(name)[0]
    return keep_gradients(model).eval()


def keep_gradients(model):
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16; returns the model.

    bitsandbytes 0.50 repacks them for inference at the first forward in eval mode, and from then on the
    frozen layers compute without autograd: with LoRA on q and k alone every gradient becomes None, with LoRA
    on all layers they are silently wrong, because nothing flows back through the base weights. There is no
    error, at most a warning. tests/test_models.py shows both sides.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


# --------------------------------------------------------------------------------------- what they compute

def causal_of(model):
    """The causal model itself where PEFT's wrapper hides it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def stop_ids(model, tokenizer, examples=()) -> list[int]:
    """Ids that end an answer: EOS of model and tokenizer, and the "end" of encoded examples."""
    own = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(example["end"] for example in examples)}
    return sorted((stops | set(own if isinstance(own, list) else [own])) - {None})


def save_companions(model, tokenizer, folder: Path, examples=()) -> None:
    """Write what other tools need beside weights: the tokenizer with its chat template, and a
    generation_config.json with `stop_ids`, so that a plain `generate` stops where our evaluation does.
    """
    generation = model.generation_config
    generation.eos_token_id = stop_ids(model, tokenizer, examples)
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def greedy(model, pad_token_id: int, stops: list[int]):
    """A context in which `model.generate` takes the most probable token each time, up to one of `stops`.

    Outside it obeys the model's own generation_config, where many ask for penalties and sampling.
    """
    config = GenerationConfig(pad_token_id=pad_token_id, eos_token_id=stops)
    return mock.patch.object(causal_of(model), "generation_config", config)


class Decoded(BaseModelOutputWithPastAndCrossAttentions):
    """What a decoder returns; models of experts ask it for `router_logits`, of which there are none here."""

    router_logits = None


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (n, vocabulary), float32, of last hidden states (n, hidden): all that follows the decoder.

    That is more than the head: Gemma 2 caps, Granite divides, Phi adds a bias. So the model's own forward
    runs, with a decoder that returns `hidden`.
    """
    causal = causal_of(model)
    decoded = Decoded(last_hidden_state=hidden[None])
    ids = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
    with mock.patch.object(causal.get_decoder(), "forward", lambda *args, **kwargs: decoded):
        return causal(input_ids=ids, use_cache=False).logits[0].float()


# ----------------------------------------------------------------------------------- layers, LoRA and size

def linear_layers(model, skip: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of the linear layers that LoRA can adapt: no head, no name with a word of `skip`.

    A packed 4-bit weight has its shape from before. GPT-2's Conv1D layers count, with (in, out).
    """
    causal = causal_of(model)
    head, layers = causal.get_output_embeddings(), {}
    for name, module in causal.named_modules():
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module is not head and not any(word in name for word in skip):
            layers[name] = tuple((getattr(module.weight, "quant_state", None) or module.weight).shape)
    return layers


def lora_targets(model, wanted: str, skip: tuple[str, ...] = ()) -> list[str] | str:
    """The knob `target_modules` as PEFT takes it, checked against the model's `linear_layers`."""
    return checks.target_modules(wanted, list(linear_layers(model, skip)), type(causal_of(model)).__name__)


def size(model) -> dict[str, int]:
    """Parameters as the architecture counts them (a packed 4-bit weight has two a byte), bytes as stored."""
    parameters = stored = 0
    for parameter in model.parameters():
        state, tensors = getattr(parameter, "quant_state", None), [parameter]
        parameters += (state or parameter).shape.numel()
        while state is not None:  # block scales, their code book, and both again for scales in 8 bits
            tensors += [state.absmax, state.code, state.offset]
            state = state.state2
        stored += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return {"parameters": parameters, "bytes": stored}
