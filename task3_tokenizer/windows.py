"""Windows: whole words around one occurrence of a term. How they are drawn, kept free of near copies, and put
into the order in which 03 trains on them."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

from sources import corpus

# Characters around an occurrence: about 50 tokens, what Token Distillation (arXiv:2505.20133) trains on.
BEFORE, AFTER = 110, 60
# A held-out window that shares half of its 5-word shingles with a training window is a copy with other
# numbers in it.
JACCARD = 0.5


# ------------------------------------------------------------------------------------------------- drawing

def places(text: str, term: str) -> list[int]:
    """Where `term` stands in `text` as a word of its own after a space."""
    return [m.start() for m in re.finditer(rf"(?<= ){re.escape(term)}(?![\w'-])", text)]


def around(text: str, start: int, length: int) -> dict:
    """{"text", "start", "end"}: whole words, about 180 characters, around text[start:start + length],
    beginning with a space."""
    left = max(0, text.rfind(" ", 0, max(1, start - BEFORE)))
    right = text.find(" ", start + length + AFTER)
    start -= left
    return {"text": text[left:right if right > 0 else None], "start": start, "end": start + length}


def draw(docs: list[dict], words: list[str], n: int, rng, fits, once: bool = False) -> list[dict]:
    """Windows of each word, around one occurrence in each of at most n documents, drawn with `rng`.
    `fits(window)` says which can be used; with `once` a document serves one word only."""
    windows, taken = [], set()
    for word in words:
        before = len(windows)
        for doc in rng.sample(docs, len(docs)):
            if len(windows) == before + n:
                break
            if doc["text"] not in taken and (starts := places(doc["text"], word)):
                window = {"term": word, **around(doc["text"], rng.choice(starts), len(word))}
                if fits(window):
                    windows.append(window)
                    taken |= {doc["text"]} if once else set()
    return windows


def near_copies(earlier: list[dict], rows: list[dict]) -> list[bool]:
    """Which of `rows` are near-duplicates of `earlier` ones or of each other's first."""
    twins = corpus.near_duplicates([row["text"] for row in earlier + rows], JACCARD, bands=32, rows=2)
    return [twin is not None for twin in twins[len(earlier):]]


def distinct(earlier: list[dict], rows: list[dict], key: str, most: int) -> list[dict]:
    """`rows` without near copies, at most `most` for each value of `key`."""
    kept, seen = [], Counter()
    for row, copy in zip(rows, near_copies(earlier, rows)):
        if not copy and seen[row[key]] < most:
            kept.append(row)
            seen[row[key]] += 1
    return kept


# --------------------------------------------------------------------------------------- order of training

def by_term(rows: list[dict]) -> list[list[dict]]:
    """The windows of each term."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["term"], []).append(row)
    return list(groups.values())


def texts_per_stage(asked: dict[str, int], windows: int) -> dict[str, int]:
    """{stage: texts} of a term with so many windows: what is `asked`, or the same share of it in every stage
    if there are fewer. SystemExit if a stage would get none."""
    if min(asked.values()) < 1 or windows < len(asked):
        raise SystemExit(f"texts per term and stage {asked}, windows of a term {windows}: "
                         "each stage needs at least one")
    share = min(1.0, windows / sum(asked.values()))
    texts = {stage: max(1, int(share * n)) for stage, n in asked.items()}
    while sum(texts.values()) > windows:  # where a stage got one instead of less
        texts[max(texts, key=texts.get)] -= 1
    return texts


def split_into_stages(rows: list[dict], asked: dict[str, int]) -> dict[str, list[dict]]:
    """{stage: windows}: of each term as many as `texts_per_stage` says, none of them twice."""
    parts: dict[str, list[dict]] = {stage: [] for stage in asked}
    for own in by_term(rows):
        following = iter(own)
        for stage, n in texts_per_stage(asked, len(own)).items():
            parts[stage] += itertools.islice(following, n)
    return parts


def interleave_terms(rows: list[dict], seed: int, batch_size: int) -> list[dict]:
    """The windows in rounds of one of each term, in random order.

    Within spans of 8 batches, similar lengths come together (7 % of the tokens are then padding instead of 25
    %), and the full batches of a span are shuffled again.
    """
    rng, groups, rounds, ordered = random.Random(seed), by_term(rows), [], []
    for k in range(max(map(len, groups))):
        now = [own[k] for own in groups if k < len(own)]
        rounds += rng.sample(now, len(now))
    for start in range(0, len(rounds), 8 * batch_size):
        span = sorted(rounds[start:start + 8 * batch_size], key=lambda row: len(row["text"]))
        batches = [span[i:i + batch_size] for i in range(0, len(span), batch_size)]
        full = [batch for batch in batches if len(batch) == batch_size]
        ordered += [row for batch in rng.sample(full, len(full)) + batches[len(full):] for row in batch]
    return ordered
