"""Question: which texts belong together, and is what the search is tested on really unseen?

Reads   the installed packages' source and questions.jsonl (or DATA=: a table or a hub id with
        `anchor`,`positive`)
Writes  results/<run>/task2_encoder/01_data.json and runs/<run>/task2_encoder/{train,dev,test}.jsonl
Needs   about 60 s and 2 GB the first time, 40 s with the parsed corpus cached under runs/assets/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from common import stats
from sources import corpus
from sources.corpus import body_key, normalise
from task2_encoder import task


@dataclass(frozen=True)
class Config(task.Config):
    # Held-out documents whose queries are asked, against each other. 1,000 is what CodeSearchNet-style tables
    # use (one right among 999), and puts the 95 % interval of a change in MRR@10 at about +-0.02.
    n_pool: int = 1000
    # More held-out documents: distractors of the full pool, and data for the topic probe. 0 = all of networkx
    # and scikit-learn.
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
# a pair of ours, so that it may be printed in full
OURS = {"anchor": "Limit a value to the closed interval from low to high.",
        "positive": "def clamp(value, low, high):\n    return max(low, min(value, high))"}


# ---------------------------------------------------------------------------------------------------- rows

def corpus_rows() -> list:
    """Corpus functions as {id, anchor, positive, package, split, module, name}; duplicates are still in."""
    # Other anchors (the summary asked back, a later sentence of the docstring) for half of the rows were
    # tried: MRR@10 fell by 0.002 to 0.006 in both searches of both runs, no difference shown.
    return [{"id": row["id"], "anchor": row["summary"], "positive": row["code"], "package": row["package"],
             "split": row["split"], "module": row["module"], "name": f"{row['module']}.{row['qualname']}"}
            for row in corpus.load(deduplicated=False)[0]]


def own_rows(cfg) -> list:
    """DATA= pairs {anchor, positive}, whose groups are drawn into the splits by seed."""
    from sources import data
    pairs = data.read_table(cfg.data, data.FORMS["task2_encoder"], cfg.n_pool + cfg.n_dev + 64,
                            "n_pool=.. n_dev=..", cfg.columns)
    rows = group([{"id": f"row{number:07}", "name": f"row {number}", "package": "own", **pair}
                  for number, pair in enumerate(pairs, 1)])
    test, rest = take(rows, cfg.n_pool, cfg.seed)
    dev, train = take(rest, cfg.n_dev, cfg.seed)
    return [row | {"split": split} for split, part in zip(SPLITS, (test, dev, train)) for row in part]


# ----------------------------------------------------------------------------------------- groups, filters

def group(rows: list) -> list:
    """Rows with `group`, equal for rows that share an anchor or a positive, directly or through others.

    Within a group every document answers every query. Counting one of them as a negative would teach and
    measure noise. (Union-find over normalised texts.)
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


def clean(rows: list) -> tuple:
    """Rows {id, anchor, positive, split} without what would leak, with `group`, and the counts of what was
    dropped.

    Dropped: pairs that repeat another, pairs whose anchor stands in the positive, rows whose group belongs to
    an earlier split of SPLITS, and near-duplicates of an earlier document (Jaccard 0.8 of 5-token shingles).
    """
    rows, counts = sorted(rows, key=lambda row: SPLITS.index(row["split"])), {"pairs": len(rows)}

    def keep(name, wanted):
        nonlocal rows
        before, rows = len(rows), [row for row in rows if wanted(row)]
        counts[name] = before - len(rows)

    first, owner = {}, {}
    keep("repeated_pair", lambda row: row is first.setdefault(
        (normalise(row["anchor"]), body_key(row["positive"])), row))
    keep("anchor_in_positive", lambda row: normalise(row["anchor"]) not in normalise(row["positive"]))
    rows = group(rows)
    keep("group_in_earlier_split", lambda row: row["split"] == owner.setdefault(row["group"], row["split"]))
    bodies = list(dict.fromkeys(body_key(row["positive"]) for row in rows))
    twins = dict(zip(bodies, corpus.near_duplicates(bodies)))
    keep("near_duplicate", lambda row: twins[body_key(row["positive"])] is None)
    return rows, {**counts, "kept": len(rows), "groups": len({row["group"] for row in rows})}


def take(rows: list, limit: int, seed: int) -> tuple:
    """(rows of whole groups drawn by seed, at most `limit` documents or all for 0; the others)."""
    members = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["id"]):  # independent of file order
        members[row["group"]].append(row)
    groups = list(members.values())
    random.Random(seed).shuffle(groups)
    taken, others, documents = [], [], 0
    for own in groups:
        size = len({body_key(row["positive"]) for row in own})
        if limit and documents + size > limit:
            others += own
        else:
            taken += own
            documents += size
    return taken, others


# ---------------------------------------------------------------------------------------------- leak gates

def leaks(train: list, held_out: list) -> dict:
    """Held-out rows that share an anchor, a positive, a near-duplicate or a group with training: none may."""
    as_code = ([{"summary": row["anchor"], "code": row["positive"]} for row in part]
               for part in (train, held_out))
    groups = {row["group"] for row in train}
    return {**corpus.leaks(*as_code), "same_group": sum(row["group"] in groups for row in held_out)}


def refuse_leaks(leaked: dict, bm25_mrr: float) -> None:
    """SystemExit if a held-out text is in training, or BM25 finds nearly all."""
    if any(leaked.values()):
        raise SystemExit(f"training shares rows with a held-out split: {leaked}; nothing was written")
    if bm25_mrr > 0.95:
        raise SystemExit(f"BM25 alone reaches MRR@10 {bm25_mrr:.3f} (limit 0.95): the anchors repeat their "
                         "positives word for word, so an encoder has nothing to show; take the anchor's text "
                         "out of them")


# -------------------------------------------------------------------------------------------------- result

def token_rows(encoder, splits: dict) -> list:
    """Percentiles of the lengths in tokens by split and side, and the share of texts that the model cuts."""
    rows = []
    for split, part in splits.items():
        for side, kind in task.SIDES.items():
            texts = [encoder.prompts[kind] + row[side] for row in part]
            lengths = np.array([len(ids) for ids in encoder.tokenizer(texts, verbose=False).input_ids])
            values = {f"{side}_tokens_p{q}": float(np.percentile(lengths, q)) for q in (50, 90, 99)}
            values[f"{side}_tokens_cut_share"] = float(np.mean(lengths > encoder.max_seq_length))
            rows += stats.facts("tokens", split, values, n=len(part))
    return rows


def splits_of(cfg) -> tuple:
    """({split: rows} as 01 writes them, counts)"""
    rows, counts = clean(corpus_rows() if cfg.data == "corpus" else own_rows(cfg))
    splits = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    asked, others = take(splits["test"], cfg.n_pool, cfg.seed)
    more = take(others, cfg.n_more, cfg.seed)[0]
    splits["test"] = [row | {"pool": True} for row in asked] + [row | {"pool": False} for row in more]
    splits["dev"] = take(splits["dev"], cfg.n_dev, cfg.seed)[0]
    splits["train"] = take(splits["train"], cfg.n_train, cfg.seed)[0]
    random.Random(cfg.seed).shuffle(splits["train"])
    counts |= {split: len(part) for split, part in splits.items()}
    if cfg.data == "corpus":
        counts["questions"] = len(task.asked(splits["test"]).queries)
    return splits, counts


def main(run):
    cfg = run.cfg
    encoder = task.load_encoder(cfg, "fp32")  # first, so that a wrong MODEL= is reported before the work
    own = Path(cfg.data).expanduser()
    if cfg.data != "corpus" and own.exists():
        run.track(own.absolute())
    task.track_questions(run)
    splits, counts = splits_of(cfg)
    if min(counts[split] for split in SPLITS) < 20:
        raise SystemExit(f"DATA={cfg.data}: every split needs at least 20 rows ({counts}); add rows")

    held_out = splits["test"] + splits["dev"]
    searches = task.searches(splits["test"], cfg)
    pool = searches["pool"]
    leaked = leaks(splits["train"], held_out)
    bm25_mrr = task.mean_mrr(task.evaluate(pool, task.bm25(pool)))
    refuse_leaks(leaked, bm25_mrr)

    answers = np.array([len(relevant) for relevant in pool.relevant.values()])
    table = stats.facts("counts", "all", counts)
    table += stats.facts("leaks", "test and dev", leaked, n=len(held_out))
    table += stats.facts("leaks", "test", {"bm25_mrr@10": bm25_mrr}, n=len(pool.queries))
    table += stats.facts("pool", "pool", {
        "queries": len(pool.queries), "documents": len(pool.documents),
        "right_answers_a_query": float(answers.mean()), "queries_with_several": int((answers > 1).sum())})
    table += stats.facts("pool", "full", {"documents": len(searches["full"].documents)})
    lengths = token_rows(encoder, splits)
    table += lengths
    run.log(max_tokens=encoder.max_seq_length, **{
        f"cut_{row['metric'].partition('_')[0]}s": f"{row['value']:.0%}" for row in lengths
        if row["name"] == "train" and row["metric"].endswith("cut_share")})
    example = OURS if cfg.data == "corpus" else splits["train"][0]
    for side in task.SIDES:
        ids = encoder.tokenizer(example[side]).input_ids
        table += [{"table": "example", "name": side, "position": i, "token": token, "id": ids[i]}
                  for i, token in enumerate(encoder.tokenizer.convert_ids_to_tokens(ids))]

    for split, part in splits.items():
        results.write_rows(run.folder / f"{split}.jsonl", part)
    run.save(table, artifacts=["train.jsonl", "dev.jsonl", "test.jsonl"])
    run.log(**counts, pool=len(pool.documents), bm25_mrr=bm25_mrr)


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
