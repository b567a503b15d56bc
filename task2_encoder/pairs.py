"""What 01_data.py does to pairs before anyone may learn from them: groups of equal texts, splits that no group crosses, leak gates."""

from __future__ import annotations

import random

from common import corpus
from common.corpus import body_key, normalise

SPLITS = ("test", "dev", "train")  # in this order a text is claimed


def group(rows: list[dict]) -> list[dict]:
    """Rows with `group`: equal for rows that share a normalised anchor or a positive, directly or through others (union-find).

    Within a group every document answers every query. Counting one of them as a negative would teach and measure noise.
    """
    parent = list(range(len(rows)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i
    first = {}
    for i, row in enumerate(rows):
        for key in (("anchor", normalise(row["anchor"])), ("positive", body_key(row["positive"]))):
            parent[root(i)] = root(first.setdefault(key, i))
    return [row | {"group": rows[root(i)]["id"]} for i, row in enumerate(rows)]


def clean(rows: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Rows {id, anchor, positive, split} without what would leak, with `group`, and the counts of what was dropped.

    Dropped: pairs that repeat another, pairs whose anchor stands in the positive, rows whose group belongs to an earlier split
    (test before dev before train), and near-duplicates of an earlier document (Jaccard 0.8 of 5-token shingles).
    """
    rows = sorted(rows, key=lambda r: SPLITS.index(r["split"]))
    counts = {"pairs": len(rows)}

    def keep(name, kept):
        nonlocal rows
        counts[name], rows = len(rows) - len(kept), kept
    first = {}
    for row in rows:
        first.setdefault((normalise(row["anchor"]), body_key(row["positive"])), row)
    keep("repeated_pair", list(first.values()))
    keep("anchor_in_positive", [r for r in rows if normalise(r["anchor"]) not in normalise(r["positive"])])
    rows, owner = group(rows), {}
    for row in rows:
        owner.setdefault(row["group"], row["split"])
    keep("group_in_earlier_split", [r for r in rows if r["split"] == owner[r["group"]]])
    bodies = {body_key(r["positive"]): r["positive"] for r in rows}
    twins = dict(zip(bodies, corpus.near_duplicates(list(bodies.values()))))
    keep("near_duplicate", [r for r in rows if twins[body_key(r["positive"])] is None])
    counts["kept"] = len(rows)
    counts["groups"] = len({r["group"] for r in rows})
    counts["rows_in_groups_of_several"] = len(rows) - sum(n == 1 for n in sizes(rows).values())
    return rows, counts


def sizes(rows: list[dict]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        found[row["group"]] = found.get(row["group"], 0) + 1
    return found


def take(rows: list[dict], limit: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(rows of whole groups, drawn by seed, as long as they have at most `limit` documents; the others). limit 0 takes all."""
    members: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["id"]):  # ids are hashes: the order owes nothing to the disk
        members.setdefault(row["group"], []).append(row)
    groups = list(members.values())
    random.Random(seed).shuffle(groups)
    taken, others, documents = [], [], 0
    for one in groups:
        size = len({body_key(r["positive"]) for r in one})
        fits = not limit or documents + size <= limit
        documents += size if fits else 0
        (taken if fits else others).extend(one)
    return taken, others


def leaks(train: list[dict], held_out: list[dict]) -> dict[str, int]:
    """Held-out rows that share an anchor, a positive, a near-duplicate or a group with training. All must be 0."""
    found = corpus.leaks(*([{"summary": r["anchor"], "code": r["positive"]} for r in part] for part in (train, held_out)))
    groups = {r["group"] for r in train}
    return {**found, "same_group": sum(r["group"] in groups for r in held_out)}


def refuse_leaks(found: dict, told: int, lexical_mrr: float) -> None:
    """The gates. SystemExit if a held-out text is in training, an anchor stands in its positive, or BM25 finds nearly everything."""
    if any(found.values()):
        raise SystemExit(f"training shares rows with a held-out split: {found}; the split is broken, nothing was written")
    if told:
        raise SystemExit(f"{told} positives still contain their anchor (a docstring left in the code?): a search would be copying")
    if lexical_mrr > 0.95:
        raise SystemExit(f"BM25 alone reaches MRR@10 {lexical_mrr:.3f} (limit 0.95): the anchors repeat their positives word for word, so "
                         "an encoder has nothing to show; take the anchor's text out of the positives")


def read_own(source: str, minimum: int) -> list[dict]:
    """DATA= pairs {anchor, positive}. SystemExit with the row for what cannot train a search: what corpus.read_table refuses, equal
    sides, one-word anchors, more duplicates than unique rows."""
    rows = corpus.read_table(source, (("anchor", "positive"),), minimum, "n_pool=.. n_dev=..")
    for number, row in enumerate(rows, 1):
        if normalise(row["anchor"]) == normalise(row["positive"]) or row["anchor"].strip() == row["positive"].strip():
            raise SystemExit(f"DATA={source} row {number}: anchor and positive are the same text ({row['anchor'][:40]!r})")
        if row["anchor"].isascii() and len(row["anchor"].split()) < 2:  # not every script puts blanks between words
            raise SystemExit(f"DATA={source} row {number}: the anchor is one word ({row['anchor'][:40]!r}); a query needs at least two")
    unique = len({(row["anchor"], row["positive"]) for row in rows})
    if len(rows) - unique > unique:
        raise SystemExit(f"DATA={source}: {len(rows) - unique} duplicate rows but {unique} unique ones; remove the repeats first")
    return rows
