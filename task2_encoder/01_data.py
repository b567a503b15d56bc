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

import json
import random
from dataclasses import dataclass

import numpy as np

from common import corpus
from task2_encoder import pairs, task


@dataclass(frozen=True)
class Config(task.Config):
    # Held-out documents whose queries are asked, against each other. 1,000 is what CodeSearchNet-style tables use (one right among
    # 999), and puts the 95 % interval of a change in MRR@10 at about +-0.02.
    n_pool: int = 1000
    # More held-out documents: distractors of the full pool, and data for the downstream task. 0 = all of networkx and scikit-learn.
    n_more: int = 0
    # Documents of the package that picks the adapter; 400 cost 5 s a look, and several looks are wanted.
    n_dev: int = 400
    # Documents kept for training, 0 = all. All: the CPU run draws what its steps need, without repeats.
    n_train: int = 0


PROFILES = {
    "smoke": dict(
        n_pool=60,  # enough for every code path
        n_more=400,  # enough that two topics have the 30 documents that task.topics wants
        n_dev=24,  # enough for every code path
        n_train=128,  # same
    ),
    "cpu": dict(),
    "gpu": dict(
        n_dev=2000,  # a GPU embeds them in seconds
    ),
}


def corpus_rows():
    """Corpus functions as {id, anchor, positive, package, name, split}; duplicates are still in."""
    return [{"id": r["id"], "anchor": r["summary"], "positive": r["code"], "package": r["package"], "split": r["split"],
             "module": r["module"], "name": f"{r['module']}.{r['qualname']}"}
            for r in corpus.load(deduplicated=False)[0]]


def own_rows(run):
    """DATA= pairs, checked, their groups dealt to the splits by seed."""
    cfg = run.cfg
    table = pairs.read_own(cfg.data, minimum=cfg.n_pool + cfg.n_dev + 64)
    if Path(cfg.data).expanduser().is_file():
        run.track(Path(cfg.data).expanduser().absolute())
    rows = pairs.group([{"id": f"row{number:07}", "name": f"row {number}", "package": "own", **row} for number, row in enumerate(table, 1)])
    test, rest = pairs.take(rows, cfg.n_pool, cfg.seed)
    dev, train = pairs.take(rest, cfg.n_dev, cfg.seed)
    return [row | {"split": split} for split, part in (("test", test), ("dev", dev), ("train", train)) for row in part]


def main(run):
    cfg = run.cfg
    encoder = task.load_encoder(cfg, "fp32")  # first: a wrong MODEL= is said before work
    tokenizer = encoder.tokenizer
    rows, counts = pairs.clean(corpus_rows() if cfg.data == "corpus" else own_rows(run))
    splits = {s: [r for r in rows if r["split"] == s] for s in pairs.SPLITS}
    asked, others = pairs.take(splits["test"], cfg.n_pool, cfg.seed)
    rest = pairs.take(others, cfg.n_more, cfg.seed)[0]
    splits["test"] = [r | {"pool": True} for r in asked] + [r | {"pool": False} for r in rest]
    splits["dev"] = pairs.take(splits["dev"], cfg.n_dev, cfg.seed)[0]
    splits["train"] = pairs.take(splits["train"], cfg.n_train, cfg.seed)[0]
    random.Random(cfg.seed).shuffle(splits["train"])
    counts |= {split: len(part) for split, part in splits.items()}
    for split, least in (("test", 20), ("dev", 20), ("train", 32)):
        if counts[split] < least:
            raise SystemExit(f"DATA={cfg.data}: {counts[split]} rows left for {split}, at least {least} needed ({counts}); add rows")

    leaks = pairs.leaks(splits["train"], splits["test"] + splits["dev"])
    everything = [row for part in splits.values() for row in part]
    repeated = sum(corpus.normalise(r["anchor"]) in corpus.normalise(r["positive"]) for r in everything)
    asked = task.pool(splits["test"])
    lexical = task.mean(task.evaluate(asked, hits=task.bm25(asked)), "mrr@10")
    pairs.refuse_leaks(leaks, repeated, lexical)

    table = [{"table": "counts", "model": "all", "metric": k, "value": v} for k, v in counts.items()]
    table += [{"table": "leaks", "model": "test and dev", "metric": k, "value": n, "n": counts["test"] + counts["dev"]} for k, n in leaks.items()]
    table += [{"table": "leaks", "model": "all", "metric": "anchor_in_positive", "value": repeated,
               "n": len(everything)},
              {"table": "leaks", "model": "test", "metric": "bm25_mrr@10", "value": lexical, "n": len(asked.queries)}]
    answers = np.array([len(relevant) for relevant in asked.relevant.values()])
    table += [{"table": "pool", "model": "pool", "metric": "queries", "value": len(asked.queries)},
              {"table": "pool", "model": "pool", "metric": "documents", "value": len(asked.documents)},
              {"table": "pool", "model": "full", "metric": "documents", "value": len(task.full(splits["test"]).documents)},
              {"table": "pool", "model": "pool", "metric": "right_answers_a_query", "value": float(answers.mean())},
              {"table": "pool", "model": "pool", "metric": "queries_with_several", "value": int((answers > 1).sum())}]
    for split, part in splits.items():
        for side, kind in (("anchor", "query"), ("positive", "document")):
            ids = tokenizer([encoder.prompts[kind] + r[side] for r in part], verbose=False).input_ids
            lengths = np.array([len(text) for text in ids])
            shown = {f"p{q}": float(np.percentile(lengths, q)) for q in (50, 90, 99)}
            shown["cut_share"] = float(np.mean(lengths > encoder.max_seq_length))
            table += [{"table": "tokens", "model": split, "metric": f"{side}_tokens_{name}", "value": value,
                       "n": len(part)} for name, value in shown.items()]
    for side, text in zip(("anchor", "positive"), task.OURS):
        table += [{"table": "example", "model": side, "position": i, "token": tokenizer.convert_ids_to_tokens(t), "id": t}
                  for i, t in enumerate(tokenizer(text).input_ids)]
        print(side, tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids))

    for split, part in splits.items():
        results.write_atomic(run.folder / f"{split}.jsonl", "".join(json.dumps(r) + "\n" for r in part))
    run.save(table, artifacts=["train.jsonl", "dev.jsonl", "test.jsonl"])
    run.log(train=counts["train"], dev=counts["dev"], test=counts["test"], pool=len(asked.documents), bm25_mrr=lexical)


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
