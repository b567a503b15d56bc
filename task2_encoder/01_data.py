"""Question: which texts belong together, and is what the search is tested on really unseen?

Reads   the installed packages' source (or DATA=: JSONL/CSV/Parquet/hub id with columns `anchor`,`positive`)
Writes  results/<run>/task2_encoder/01_data.json and runs/<run>/task2_encoder/{train,dev,test}.jsonl
Needs   about 60 s and 1.5 GB the first time, 40 s with the parsed corpus cached under runs/assets/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's modules, not another's

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import random
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from common import corpus
from common.corpus import body_key, normalise
from task2_encoder import task


@dataclass(frozen=True)
class Config(task.Config):
    # Held-out documents whose queries are asked, against each other. 1,000 is what CodeSearchNet-style tables use
    # (one right among 999), and puts the 95 % interval of a change in MRR@10 at about +-0.02.
    n_pool: int = 1000
    # More held-out documents: distractors of the full pool, and data for the topic probe. 0 = all of networkx and
    # scikit-learn.
    n_more: int = 0
    # Documents of the package that picks the adapter; 400 cost 5 s an evaluation, and several are wanted.
    n_dev: int = 400
    # Documents kept for training, 0 = all. All: the CPU run draws what its steps need, without repeats.
    n_train: int = 0


PROFILES = {
    "smoke": dict(
        n_pool=60,
        n_more=400,  # enough that two topics have the 30 documents that task.topics wants
        n_dev=24,
        n_train=128,
    ),
    "cpu": dict(),
    "gpu": dict(n_dev=2000),
}
SPLITS = ("test", "dev", "train")  # a text that occurs in several belongs to the first of them
OURS = {"anchor": "Limit a value to the closed interval from low to high.",  # ours, so it may be printed in full
        "positive": "def clamp(value, low, high):\n    return max(low, min(value, high))"}


# ------------------------------------------------------------------------------------------------ rows

def corpus_rows() -> list[dict]:
    """Corpus functions as {id, anchor, positive, package, split, module, name}; duplicates are still in."""
    return [{"id": row["id"], "anchor": row["summary"], "positive": row["code"], "package": row["package"],
             "split": row["split"], "module": row["module"], "name": f"{row['module']}.{row['qualname']}"}
            for row in corpus.load(deduplicated=False)[0]]


def own_rows(source: str, n_pool: int, n_dev: int, seed: int) -> list[dict]:
    """DATA= pairs, checked, whose groups are drawn into the splits by seed."""
    rows = group([{"id": f"row{number:07}", "name": f"row {number}", "package": "own", **row}
                  for number, row in enumerate(read_own(source, minimum=n_pool + n_dev + 64), 1)])
    test, rest = take(rows, n_pool, seed)
    dev, train = take(rest, n_dev, seed)
    return [row | {"split": split} for split, part in zip(SPLITS, (test, dev, train)) for row in part]


def read_own(source: str, minimum: int) -> list[dict]:
    """DATA= pairs {anchor, positive}. SystemExit with the row for what cannot train a search: what
    corpus.read_table refuses, equal sides, one-word anchors, more duplicates than unique rows."""
    rows = corpus.read_table(source, (("anchor", "positive"),), minimum, "n_pool=.. n_dev=..")
    for number, row in enumerate(rows, 1):
        where, anchor = f"DATA={source} row {number}", row["anchor"]
        if normalise(anchor) == normalise(row["positive"]) or anchor.strip() == row["positive"].strip():
            raise SystemExit(f"{where}: anchor and positive are the same text ({anchor[:40]!r})")
        if anchor.isascii() and len(anchor.split()) < 2:  # not every script puts spaces between words
            raise SystemExit(f"{where}: the anchor is one word ({anchor[:40]!r}); a query needs at least two")
    unique = len({(row["anchor"], row["positive"]) for row in rows})
    if len(rows) - unique > unique:
        raise SystemExit(f"DATA={source}: {len(rows) - unique} duplicate rows but {unique} unique ones; remove the "
                         "repeats first")
    return rows


# ------------------------------------------------------------------------------------------------ groups and filters

def group(rows: list[dict]) -> list[dict]:
    """Rows with `group`, equal for rows that share an anchor or a positive, directly or through others.

    Within a group every document answers every query. Counting one of them as a negative would teach and measure
    noise. (Union-find over normalised texts.)
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

    Dropped: pairs that repeat another, pairs whose anchor stands in the positive, rows whose group belongs to an
    earlier split of SPLITS, and near-duplicates of an earlier document (Jaccard 0.8 of 5-token shingles).
    """
    steps = {"pairs": sorted(rows, key=lambda row: SPLITS.index(row["split"]))}
    unique = {}
    for row in steps["pairs"]:
        unique.setdefault((normalise(row["anchor"]), body_key(row["positive"])), row)
    steps["repeated_pair"] = list(unique.values())
    steps["anchor_in_positive"] = [row for row in steps["repeated_pair"] if not repeats_anchor(row)]

    grouped, owner = group(steps["anchor_in_positive"]), {}
    for row in grouped:
        owner.setdefault(row["group"], row["split"])
    kept = steps["group_in_earlier_split"] = [row for row in grouped if row["split"] == owner[row["group"]]]

    bodies = {body_key(row["positive"]): row["positive"] for row in kept}
    twins = dict(zip(bodies, corpus.near_duplicates(list(bodies.values()))))
    kept = steps["near_duplicate"] = [row for row in kept if twins[body_key(row["positive"])] is None]

    left = [len(part) for part in steps.values()]
    dropped = {name: before - after for name, before, after in zip(list(steps)[1:], left, left[1:])}
    sizes = Counter(row["group"] for row in kept)
    return kept, {"pairs": left[0], **dropped, "kept": left[-1], "groups": len(sizes),
                  "rows_in_groups_of_several": sum(size for size in sizes.values() if size > 1)}


def repeats_anchor(row: dict) -> bool:
    return normalise(row["anchor"]) in normalise(row["positive"])


def take(rows: list[dict], limit: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(rows of whole groups drawn by seed, at most `limit` documents or all for 0; the others)."""
    members = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["id"]):  # independent of file order
        members[row["group"]].append(row)
    groups = list(members.values())
    random.Random(seed).shuffle(groups)
    taken, others, documents = [], [], 0
    for own in groups:
        size = len({body_key(row["positive"]) for row in own})
        fits = not limit or documents + size <= limit
        documents += size if fits else 0
        (taken if fits else others).extend(own)
    return taken, others


# ------------------------------------------------------------------------------------------------ leak gates

def leaks(train: list[dict], held_out: list[dict]) -> dict[str, int]:
    """Held-out rows that share an anchor, a positive, a near-duplicate or a group with training. All must be 0."""
    as_code = ([{"summary": row["anchor"], "code": row["positive"]} for row in part] for part in (train, held_out))
    groups = {row["group"] for row in train}
    return {**corpus.leaks(*as_code), "same_group": sum(row["group"] in groups for row in held_out)}


def refuse_leaks(leaked: dict, repeated: int, bm25_mrr: float) -> None:
    """SystemExit if a held-out text is in training, an anchor stands in its positive, or BM25 finds nearly all."""
    if any(leaked.values()):
        raise SystemExit(f"training shares rows with a held-out split: {leaked}; nothing was written")
    if repeated:
        raise SystemExit(f"{repeated} positives still contain their anchor (a docstring left in the code?): a "
                         "search would be copying")
    if bm25_mrr > 0.95:
        raise SystemExit(f"BM25 alone reaches MRR@10 {bm25_mrr:.3f} (limit 0.95): the anchors repeat their positives "
                         "word for word, so an encoder has nothing to show; take the anchor's text out of them")


# ------------------------------------------------------------------------------------------------ what is reported

def token_rows(encoder, splits: dict[str, list[dict]]) -> list[dict]:
    """Percentiles of the lengths in tokens by split and side, and the share of texts that the model cuts."""
    rows = []
    for split, part in splits.items():
        for side, kind in (("anchor", "query"), ("positive", "document")):
            texts = [encoder.prompts[kind] + row[side] for row in part]
            lengths = np.array([len(ids) for ids in encoder.tokenizer(texts, verbose=False).input_ids])
            values = {f"p{q}": float(np.percentile(lengths, q)) for q in (50, 90, 99)}
            values["cut_share"] = float(np.mean(lengths > encoder.max_seq_length))
            rows += [{"table": "tokens", "name": split, "metric": f"{side}_tokens_{name}", "value": value,
                      "n": len(part)} for name, value in values.items()]
    return rows


def main(run):
    cfg = run.cfg
    encoder = task.load_encoder(cfg, "fp32")  # first, so that a wrong MODEL= is reported before the work
    if Path(cfg.data).expanduser().is_file():
        run.track(Path(cfg.data).expanduser().absolute())
    source = corpus_rows() if cfg.data == "corpus" else own_rows(cfg.data, cfg.n_pool, cfg.n_dev, cfg.seed)
    rows, counts = clean(source)

    splits = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    asked, others = take(splits["test"], cfg.n_pool, cfg.seed)
    more = take(others, cfg.n_more, cfg.seed)[0]
    splits["test"] = [row | {"pool": True} for row in asked] + [row | {"pool": False} for row in more]
    splits["dev"] = take(splits["dev"], cfg.n_dev, cfg.seed)[0]
    splits["train"] = take(splits["train"], cfg.n_train, cfg.seed)[0]
    random.Random(cfg.seed).shuffle(splits["train"])
    counts |= {split: len(part) for split, part in splits.items()}
    for split, least in (("test", 20), ("dev", 20), ("train", 32)):
        if counts[split] < least:
            raise SystemExit(f"DATA={cfg.data}: {counts[split]} rows left for {split}, at least {least} needed "
                             f"({counts}); add rows")

    held_out = splits["test"] + splits["dev"]
    leaked, repeated = leaks(splits["train"], held_out), sum(map(repeats_anchor, splits["train"] + held_out))
    searches = task.searches(splits["test"], cfg)
    pool = searches["pool"]
    bm25_mrr = task.mean(task.evaluate(pool, task.bm25(pool)))
    refuse_leaks(leaked, repeated, bm25_mrr)

    answers = np.array([len(relevant) for relevant in pool.relevant.values()])
    table = [{"table": "counts", "name": "all", "metric": name, "value": value} for name, value in counts.items()]
    table += [{"table": "leaks", "name": "test and dev", "metric": name, "value": value, "n": len(held_out)}
              for name, value in leaked.items()]
    table += [{"table": "leaks", "name": "all", "metric": "anchor_in_positive", "value": repeated,
               "n": len(splits["train"] + held_out)},
              {"table": "leaks", "name": "test", "metric": "bm25_mrr@10", "value": bm25_mrr, "n": len(pool.queries)}]
    table += [{"table": "pool", "name": name, "metric": metric, "value": value} for name, metric, value in (
        ("pool", "queries", len(pool.queries)),
        ("pool", "documents", len(pool.documents)),
        ("full", "documents", len(searches["full"].documents)),
        ("pool", "right_answers_a_query", float(answers.mean())),
        ("pool", "queries_with_several", int((answers > 1).sum())))]
    table += token_rows(encoder, splits)
    for side, text in OURS.items():
        ids = encoder.tokenizer(text).input_ids
        tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
        table += [{"table": "example", "name": side, "position": i, "token": token, "id": id_}
                  for i, (token, id_) in enumerate(zip(tokens, ids))]
        print(side, tokens)

    for split, part in splits.items():
        results.write_rows(run.folder / f"{split}.jsonl", part)
    run.save(table, artifacts=["train.jsonl", "dev.jsonl", "test.jsonl"])
    run.log(train=counts["train"], dev=counts["dev"], test=counts["test"], pool=len(pool.documents), bm25_mrr=bm25_mrr)


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
