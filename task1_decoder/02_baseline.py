"""Question: how good is the model before training, and how far does a good prompt alone get it?

A process of its own, in which no adapter exists: a "before" that was measured with an adapter attached is the costliest mistake of
such comparisons.

Reads   runs/<run>/task1_decoder/{test,train,choice}.jsonl of 01
Writes  results/<run>/task1_decoder/02_baseline.json, runs/<run>/task1_decoder/items_base.json (per item, for the paired tests of 04)
Needs   about 3.5 min and 2 GB on 2 cores
"""

import json
from dataclasses import dataclass

from common import models, results
from task1_decoder import task


@dataclass(frozen=True)
class Config(task.Config):
    # The baseline is what 03 starts from: the model in 4 bits. 04 shows what 16 bits give.
    precision: str = "nf4"
    # Held-out items also scored with three worked examples in the prompt. The shared examples are read once, so they cost little more; 0 = all.
    n_few_shot: int = 0


PROFILES = {"smoke": dict(), "cpu": dict(), "gpu": dict()}


def main(run):
    cfg = run.cfg
    run.load("01_data")
    tokenizer = models.load_tokenizer(cfg.model)
    model = models.load_decoder(cfg.model, cfg.precision)
    size = models.size(model)
    sizes = {"parameters": size["parameters"], "bytes_4bit": size["bytes"], "bytes_16bit": 2 * size["parameters"]}
    run.log(**{k: v / 1e6 for k, v in sizes.items()}, unit="million")

    measured = task.measure(model, tokenizer, run)
    test = results.read_rows(run.artifact("01_data", "test.jsonl"))[:cfg.n_few_shot or None]
    few_shot = task.score(model, tokenizer, test, cfg, task.trained_texts(run), task.SHOTS)
    run.log(measured="3-shot", nll_per_token=sum(i["nats"] for i in few_shot) / sum(i["tokens"] for i in few_shot))

    results.write_atomic(run.folder / "items_base.json", json.dumps({"zero-shot": measured, "3-shot": few_shot}))
    for precision in ("nf4", "bf16"):  # the table that says whether training will fit, before anyone trains
        weights = size["bytes"] if precision == "nf4" else 2 * size["parameters"]
        for batch in (1, 8, 16, 32):
            columns = cfg.max_prompt_tokens + cfg.max_completion_tokens + 24
            parts = task.training_memory(model, 16, batch, columns, cfg.max_completion_tokens)
            sizes[f"predicted_training_bytes_{precision}_{batch}_rows"] = parts["total"] - parts["weights"] + weights
    rows = [{"table": "size", "model": "base", "metric": name, "value": value} for name, value in sizes.items()]
    rows += task.rows_of(measured, "base") + task.rows_of({"heldout": few_shot}, "base 3-shot")
    run.save(rows, artifacts=["items_base.json"])
    run.log(base_nll_per_token=next(r["value"] for r in rows if r["metric"] == "nll_per_token"), n=cfg.n_benchmark)


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
