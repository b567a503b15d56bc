"""Question: how good is search before training, against chance and against a search engine that needs none?

A process of its own, in which no adapter exists.

Reads   runs/<run>/task2_encoder/test.jsonl of 01, task2_encoder/questions.jsonl
Writes  results/<run>/task2_encoder/02_baseline.json, runs/<run>/task2_encoder/items_base.json
Needs   about 2.5 min and 2 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import json

from common import models, stats
from task2_encoder import task


def main(run):
    cfg = run.cfg
    run.load("01_data")
    test = run.rows("test")
    searches = task.searches(test, cfg)
    task.track_questions(run)
    pools = {name: searches[name] for name in task.SHARED if name in searches}
    items = {
        "random": {name: task.evaluate(pool, task.at_random(pool, cfg.seed)) for name, pool in pools.items()},
        "BM25": {name: task.evaluate(pool, task.bm25(pool)) for name, pool in pools.items()},
    }

    model, base = task.load_encoder(cfg), f"{models.label(cfg.precision)} base"
    size = models.size(model)
    items[base], _ = task.measure(model, searches, cfg, test)
    model = task.load_encoder(cfg, "fp32")
    if base != "fp32 base":
        items["fp32 base"], _ = task.measure(model, pools, cfg)

    sizes = {"parameters": size["parameters"], f"bytes_{cfg.precision}": size["bytes"],
             "bytes_fp32": models.size(model)["bytes"]}
    rows = stats.facts("size", "base", sizes)
    for name, measured in items.items():
        for table, pool in pools.items():
            rows += stats.rows_of(table, name, measured[table], task.METRICS, documents=len(pool.documents))
    results.write_atomic(run.folder / "items_base.json", json.dumps(items))
    run.save(rows, artifacts=["items_base.json"])
    run.log(**{name.replace(" ", "_"): task.mean_mrr(measured["pool"]) for name, measured in items.items()})


if __name__ == "__main__":
    runner.start(main, task.Config, task.PROFILES)
