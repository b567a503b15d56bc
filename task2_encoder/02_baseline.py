"""Question: how good is search before training, against chance and against a search engine that needs none?

A process of its own, in which no adapter exists.

Reads   runs/<run>/task2_encoder/test.jsonl of 01
Writes  results/<run>/task2_encoder/02_baseline.json, runs/<run>/task2_encoder/{items_base.json,vectors_base.safetensors}
Needs   about 2 min and 2 GB on 2 cores
"""

import json
from dataclasses import dataclass

from safetensors.torch import save_file

from common import models, results
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

    model = models.load_encoder(cfg.model, "nf4", cfg.double_quant, cfg.max_tokens)
    size = models.size(model)
    items["NF4 base"], vectors = task.measure(model, run, test)
    del model
    model = models.load_encoder(cfg.model, "fp32", max_tokens=cfg.max_tokens)
    items["fp32 base"] = task.measure_pools(model, run, test)

    rows = [{"table": "size", "model": "base", "metric": k, "value": v} for k, v in
            {"parameters": size["parameters"], "bytes_4bit": size["bytes"], "bytes_fp32": models.size(model)["bytes"]}.items()]
    for model_name, tables in items.items():
        rows += task.rows_of(tables, model_name, test, cfg.n_general)
    results.write_atomic(run.folder / "items_base.json", json.dumps(items))
    save_file(vectors["document"], run.folder / "vectors_base.safetensors")
    run.save(rows, artifacts=["items_base.json", "vectors_base.safetensors"])
    run.log(**{name.replace(" ", "_"): task.mean(tables["pool"], "mrr@10") for name, tables in items.items()}, documents=len(pools["pool"].documents))


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
