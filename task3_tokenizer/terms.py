"""Which words deserve a token: found by keyness, fragmentation and spread, with a reason for every rejected candidate."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from pathlib import Path

from task3_tokenizer import vocabulary

WORD = re.compile(r"(?<= )[^\W\d_][\w'-]*\w")  # a word as running text has it, after a blank; what it may not be is said by `reject`
COLUMNS = ("term", "anchors", "negative_anchors", "definition")


def uses(texts: list[str]) -> tuple[Counter, Counter]:
    """(occurrences, documents) of every word that follows a blank."""
    occurrences, documents = Counter(), Counter()
    for text in texts:
        found = WORD.findall(" " + " ".join(text.split()))
        occurrences.update(found)
        documents.update(set(found))
    return occurrences, documents


def keyness(count: int, total: int, other: int, other_total: int) -> float:
    """Signed square root of the log-likelihood ratio G2 (Dunning 1993): how far a word's rate here stands above its rate in general
    text, in standard deviations; negative where it is rarer here."""
    rate = (count + other) / (total + other_total)
    g2 = 2 * sum(k * math.log(k / (n * rate)) for k, n in ((count, total), (other, other_total)) if k)
    return math.copysign(math.sqrt(max(0.0, g2)), count / total - other / other_total)


def reject(tokenizer, word: str, documents: int, held_out: int, least: int, least_held_out: int) -> str | None:
    """Why a word cannot be, or is not worth, a new token; None if it can and is."""
    if re.search(r"\d", word):
        return "has digits"
    if not word.isalpha():
        return "has punctuation"
    if len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(f" {word}")) != 1:
        return "several pre-tokens"
    if len(vocabulary.pieces(tokenizer, f" {word}")) < 2:
        return "one token already"
    if documents < least:
        return f"in {documents} training documents, {least} needed"
    if held_out < least_held_out:
        return f"in {held_out} held-out documents, {least_held_out} needed"
    return None


def find(tokenizer, train: list[str], held_out: list[str], general: list[str], least: int, least_held_out: int) -> list[dict]:
    """Candidates with score = keyness x (pieces - 1) x log(1 + documents), best first: {"term", "score", "keyness", "pieces" (entries),
    "occurrences", "documents", "held_out_documents", "rejected" (reason or None)}.

    The factors: far more frequent here than in general English; tokens saved by each use; spread over texts, so that no single one
    supplies the word. Candidates are words in at least half of `least` documents, so that the near misses are shown too.
    """
    occurrences, documents = uses(train)
    _, held_documents = uses(held_out)
    other, _ = uses(general)
    total, other_total, rows = sum(occurrences.values()), max(1, sum(other.values())), []
    for word, spread in documents.items():
        entries = vocabulary.pieces(tokenizer, f" {word}")
        if spread < least / 2 or len(entries) < 2:
            continue
        key = keyness(occurrences[word], total, other[word], other_total)
        rows.append({"term": word, "score": key * (len(entries) - 1) * math.log1p(spread), "keyness": key, "pieces": entries,
                     "occurrences": occurrences[word], "documents": spread, "held_out_documents": held_documents[word],
                     "rejected": reject(tokenizer, word, spread, held_documents[word], least, least_held_out)})
    return sorted(rows, key=lambda r: (-r["score"], r["term"]))


def read_terms(path: Path, tokenizer) -> list[dict]:
    """Rows of a hand-made terms.csv {term, anchors, negative_anchors (lists), definition}. SystemExit with the line for bad UTF-8, an
    empty file, missing columns, what vocabulary.check_terms refuses, or an anchor that is not a single token."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise SystemExit(f"{path.name}: not UTF-8 at byte {err.start}; save the file as UTF-8") from None
    rows = list(csv.DictReader(text.splitlines()))
    if not rows:
        raise SystemExit(f"{path.name}: no terms; expected columns {', '.join(COLUMNS)} and a line per term")
    if missing := [c for c in COLUMNS if c not in rows[0]]:
        raise SystemExit(f"{path.name}: no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    vocabulary.check_terms(tokenizer, [row["term"] for row in rows])
    out = []
    for number, row in enumerate(rows, 2):
        lists = {side: (row[side] or "").split() for side in ("anchors", "negative_anchors")}
        for side, words in lists.items():
            for word in words:
                if len(cut := vocabulary.pieces(tokenizer, f" {word}")) != 1:
                    raise SystemExit(f"{path.name} line {number}: {side[:-1]} {word!r} of {row['term']!r} is {len(cut)} tokens; "
                                     "an anchor must be one")
        out.append({"term": row["term"], **lists, "definition": row["definition"] or ""})
    return out
