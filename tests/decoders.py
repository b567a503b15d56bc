"""Tiny random checkpoints of many architectures, whose weights are large enough that caps, scales, biases
and windows matter: a score that left one of them out would be far off.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GEMMA = dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16, tie_word_embeddings=True)
# name -> (architecture, what differs from SIZES); "BOS" is a base model without chat template whose
# tokenizer adds BOS, "padded" has more rows than its tokenizer has ids
DECODERS = {
    "Llama": ("Llama", dict(tie_word_embeddings=False)),
    "Llama tied": ("Llama", dict(tie_word_embeddings=True)),
    "BOS": ("Llama", dict(tie_word_embeddings=True)),
    "padded": ("Llama", dict(tie_word_embeddings=False)),
    "Qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "Qwen3": ("Qwen3", dict(tie_word_embeddings=True, head_dim=16)),
    "Mistral": ("Mistral", dict(sliding_window=16, tie_word_embeddings=False)),
    "Gemma-2": ("Gemma2", dict(GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=2.0)),
    "Gemma-3": ("Gemma3Text", dict(GEMMA, final_logit_softcapping=3.0)),
    "Granite": ("Granite", dict(logits_scaling=4.0, embedding_multiplier=6.0, tie_word_embeddings=True)),
    "Phi": ("Phi", dict(num_key_value_heads=4)),
    "GPT-NeoX": ("GPTNeoX", dict()),
    "Mixtral": ("Mixtral", dict(num_local_experts=2)),
    "GPT-2": (
        "GPT2",
        dict(n_embd=64, n_layer=2, n_head=4, n_inner=96, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    ),
}
# a template like Gemma's: it refuses a system message and ends a turn with a token of its own that is not EOS
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for turn in messages %}<file_sep>{{ turn.role }}: {{ turn.content | trim }}<reponame>\n{% endfor %}"
    "{% if add_generation_prompt %}<file_sep>assistant: {% endif %}"
)


def with_tokenizer(tokenizer, name: str):
    """A copy of the tokenizer as that kind of model has it: its chat template, and what it puts before a
    text.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        own = AutoTokenizer.from_pretrained(folder)
    if name.startswith("Gemma"):
        own.chat_template = NO_SYSTEM
    if name in ("BOS", "GPT-NeoX", "GPT-2"):
        own.chat_template = None
    if name == "BOS":
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return own


def save_decoder(name: str, tokenizer, folder: Path, **differences) -> Path:
    """A tiny random checkpoint of that architecture with the tokenizer of SmolLM2, changed as
    `with_tokenizer` says.
    """
    kind, own = DECODERS[name]
    torch.manual_seed(0)
    size = len(tokenizer) + 64 * (name == "padded")
    config = getattr(transformers, f"{kind}Config")(**SIZES | dict(vocab_size=size) | own | differences)
    model = AutoModelForCausalLM.from_config(config)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(folder)
    with_tokenizer(tokenizer, name).save_pretrained(folder)
    return Path(folder)


def write_rows(file: Path, n: int = 80) -> Path:
    """Own data of n different prompt/completion rows."""
    words = ["river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin"]
    rows = [
        {
            "prompt": f"Which number has the {words[i % 10]} {words[(i * 3) % 10]} of row {i}, "
            f"counted from {words[(i * 7) % 10]}?",
            "completion": f"The {words[(i * 7) % 10]} number {i * i} of {words[i % 10]}.",
        }
        for i in range(n)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
