"""Question: how good is search before training, against chance and against a search engine that needs none?

A process of its own, in which no adapter exists.

Reads   runs/<run>/task2_encoder/test.jsonl of 01
Writes  results/<run>/task2_encoder/02_baseline.json, runs/<run>/task2_encoder/{items_base.json,vectors_base.safetensors}
Needs   about 2 min and 2 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's modules, not another's

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import json
from dataclasses import dataclass

from safetensors.torch import save_file

from common import models
from task2_encoder import task


@dataclass(frozen=True)
class Config(task.Config):
    """Nothing of its own: a baseline has nothing to choose."""


PROFILES = {"smoke": dict(), "cpu": dict(), "gpu": dict()}


def main(run):
    cfg = run.cfg
    run.load("01_data")
    test = results.read_rows(run.artifact("01_data", "test.jsonl"))
    pools = {"pool": task.pool(test), "full": task.full(test)}
    items = {"random": {name: task.evaluate(pool, hits=task.at_random(pool, cfg.seed)) for name, pool in pools.items()},
             "BM25": {name: task.evaluate(pool, hits=task.bm25(pool)) for name, pool in pools.items()}}

    model, base = task.load_encoder(cfg), f"{models.label(cfg.precision)} base"
    size = models.size(model)
    items[base], vectors = task.measure(model, run, test)
    del model
    model = task.load_encoder(cfg, "fp32")
    if base != "fp32 base":
        items["fp32 base"] = task.measure_pools(model, run, test)

    sizes = {"parameters": size["parameters"], f"bytes_{cfg.precision}": size["bytes"],
             "bytes_fp32": models.size(model)["bytes"]}
    rows = [{"table": "size", "model": "base", "metric": k, "value": v} for k, v in sizes.items()]
    for model_name, tables in items.items():
        rows += task.rows_of(tables, model_name, test, cfg.n_general)
    results.write_atomic(run.folder / "items_base.json", json.dumps(items))
    save_file(vectors["document"], run.folder / "vectors_base.safetensors")
    run.save(rows, artifacts=["items_base.json", "vectors_base.safetensors"])
    run.log(**{name.replace(" ", "_"): task.mean(tables["pool"], "mrr@10") for name, tables in items.items()}, documents=len(pools["pool"].documents))


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
