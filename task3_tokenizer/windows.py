"""Windows: whole words around one use of a term, what 03 trains on and 04 scores, and which of them are near copies of each other."""

from __future__ import annotations

import re
from collections import Counter

from common import corpus

BEFORE, AFTER = 110, 60  # characters around a use: about 50 tokens, what Token Distillation (arXiv:2505.20133) trains on
JACCARD = 0.5  # a held-out window that shares half its 5-word shingles with a training window is a copy with other numbers in it


def places(text: str, term: str) -> list[int]:
    """Where `term` stands in `text` as a word of its own after a blank."""
    return [m.start() for m in re.finditer(rf"(?<= ){re.escape(term)}(?![\w'-])", text)]


def around(text: str, start: int, length: int) -> dict:
    """{"text", "start", "end"}: whole words, about 180 characters, around text[start:start + length], beginning with a blank."""
    left = text.rfind(" ", 0, max(1, start - BEFORE))
    left = max(0, left)
    right = text.find(" ", start + length + AFTER)
    return {"text": text[left:right if right > 0 else None], "start": start - left, "end": start - left + length}


def draw(docs: list[dict], word: str, n: int, rng, fits, taken: set | None = None) -> list[dict]:
    """Windows around one use of `word` in each of at most n documents, drawn with `rng`; `fits` says which will do, `taken` collects the
    documents used, which are not used again."""
    out, taken = [], set() if taken is None else taken
    for doc in rng.sample(docs, len(docs)):
        if len(out) == n:
            break
        if doc["text"] not in taken and (starts := places(doc["text"], word)):
            row = {"term": word, **around(doc["text"], rng.choice(starts), len(word))}
            if fits(row):
                out.append(row)
                taken.add(doc["text"])
    return out


def distinct(rows: list[dict], most: int) -> list[dict]:
    """Rows without near-duplicates of earlier ones, at most `most` of a term and split."""
    twins, seen, kept = corpus.near_duplicates([row["text"] for row in rows], JACCARD, bands=32, rows=2), Counter(), []
    for row, twin in zip(rows, twins):
        if twin is None and seen[key := (row["term"], row.get("split"))] < most:
            kept.append(row)
            seen[key] += 1
    return kept


def twins_of(taught: list[dict], held_out: list[dict]) -> list[bool]:
    """Which held-out windows are near-duplicates of an earlier one, in training or held out."""
    found = corpus.near_duplicates([row["text"] for row in taught + held_out], JACCARD, bands=32, rows=2)
    return [twin is not None for twin in found[len(taught):]]


def fresh(taught: list[dict], held_out: list[dict], key: str, most: int) -> tuple[list[dict], int]:
    """(held-out rows without near-duplicates of training or of earlier ones, since items are to be independent, at most `most` for each
    value of `key`; how many were near-duplicates)."""
    kept, seen, twins = [], Counter(), twins_of(taught, held_out)
    for row, twin in zip(held_out, twins):
        if not twin and seen[row[key]] < most:
            kept.append(row)
            seen[row[key]] += 1
    return kept, sum(twins)
