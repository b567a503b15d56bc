"""Which words deserve a token: those found by keyness, fragmentation and spread, or a list that a person
made."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

from sources import data
from task3_tokenizer import vocabulary

WORD = re.compile(r"(?<= )[^\W\d_][\w'-]*\w")  # a word after a space; `reject` excludes some


def count(texts: list[str]) -> tuple[Counter, Counter]:
    """(occurrences, documents) of every word that follows a space, in texts as from `task.documents`."""
    occurrences, documents = Counter(), Counter()
    for text in texts:
        words = WORD.findall(text)
        occurrences.update(words)
        documents.update(set(words))
    return occurrences, documents


def keyness(count: int, total: int, other: int, other_total: int) -> float:
    """Signed square root of the log-likelihood ratio G2 (Dunning 1993): by how many standard deviations a
    word is more frequent here than in general text; negative where it is rarer."""
    rate = (count + other) / (total + other_total)
    g2 = 2 * sum(k * math.log(k / (n * rate)) for k, n in ((count, total), (other, other_total)) if k)
    return math.copysign(math.sqrt(max(0.0, g2)), count / total - other / other_total)


def reject(tokenizer, word: str, documents: int, held_out: int, least: int,
           least_held_out: int) -> str | None:
    """Why a word cannot be, or is not worth, a new token; None if it can and is."""
    if re.search(r"\d", word):
        return "has digits"
    if not word.isalpha():
        return "has punctuation"
    if len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(f" {word}")) != 1:
        return "several pre-tokens"
    if documents < least:
        return f"in {documents} training documents, {least} needed"
    if held_out < least_held_out:
        return f"in {held_out} held-out documents, {least_held_out} needed"
    return None


def find(tokenizer, train: list[str], held_out: list[str], general: list[str], least: int,
         least_held_out: int) -> list[dict]:
    """Candidates, best first: {"term", "score", "keyness", "pieces" (texts), "documents",
    "held_out_documents", "rejected" (reason or None)}.

    score = keyness x (pieces - 1) x log(1 + documents): far more frequent here than in general English,
    tokens saved by each occurrence, and spread over texts, so that no single one supplies the word.
    Candidates are words of two pieces or more in at least half of `least` documents, so that near misses are
    shown too.
    """
    occurrences, documents = count(train)
    _, held_documents = count(held_out)
    other, _ = count(general)
    total, other_total, rows = sum(occurrences.values()), sum(other.values()), []
    for word, spread in documents.items():
        entries = vocabulary.pieces(tokenizer, f" {word}")
        if spread >= least / 2 and len(entries) >= 2:
            key = keyness(occurrences[word], total, other[word], other_total)
            n_held_out = held_documents[word]
            rows.append({"term": word, "score": key * (len(entries) - 1) * math.log1p(spread), "keyness": key,
                         "pieces": [tokenizer.convert_tokens_to_string([entry]) for entry in entries],
                         "documents": spread, "held_out_documents": n_held_out,
                         "rejected": reject(tokenizer, word, spread, n_held_out, least, least_held_out)})
    return sorted(rows, key=lambda r: (-r["score"], r["term"]))


def read_terms(path: Path, tokenizer) -> list[dict]:
    """Rows of a hand-made list {term, anchors, negative_anchors (lists)}. SystemExit in one line for what
    data.read_terms or vocabulary.check_terms refuses, or an anchor that is not a single token."""
    rows = data.read_terms(path)
    vocabulary.check_terms(tokenizer, [row["term"] for row in rows])
    terms = []
    for number, row in enumerate(rows, 2):
        lists = {side: row[side].split() for side in ("anchors", "negative_anchors")}
        for side, words in lists.items():
            for word in words:
                if len(pieces := vocabulary.pieces(tokenizer, f" {word}")) != 1:
                    raise SystemExit(f"{path.name} line {number}: {side[:-1]} {word!r} of {row['term']!r} is "
                                     f"{len(pieces)} tokens; an anchor must be one")
        terms.append({"term": row["term"], **lists})
    return terms
