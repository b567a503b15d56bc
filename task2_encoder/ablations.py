"""Question: which of the choices in 03 mattered, and would pairs that do not belong together have done as well?

Every row is a training of its own with one thing changed, scored once on the queries of 04. Not numbered, because nothing depends on
it; `make ablations` runs it. Interrupted, the same command goes on with the row it was at.

Reads   the knobs and data of 01-04 of the same run
Writes  results/<run>/task2_encoder/ablations.json, runs/<run>/task2_encoder/ablations/
Needs   about 2.5 min a row, 27 min in all, and 4 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's modules, not another's

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import json
import re
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

from common import models
from common import trainer as trainer_common
from task2_encoder import task, training


@dataclass(frozen=True)
class Config(task.Config):
    # Names of the rows to train, separated by ";" ("" = all): for one more look at one of them.
    only: str = ""


PROFILES = {
    "smoke": dict(
        only="shuffled pairs;full fine-tune, lr 1e-4",  # the two that take another path through the code
    ),
    "cpu": dict(),
    "gpu": dict(),
}
# name -> (method, knobs changed); what 03 itself trained is the row they are compared with
ROWS = {
    "shuffled pairs": ("qlora", {}),  # the control: every anchor with the positive of another row of its package
    "LoRA on the fp32 base": ("lora", {}),
    "full fine-tune, lr 1e-4": ("full", {"learning_rate": 1e-4}),  # a tenth of LoRA's on a CPU, a fifth on a GPU; 2e-5 is usual for longer runs
    "batches across packages": ("qlora", {"same_package": False}),
    "rank 4": ("qlora", {"lora_r": 4, "lora_alpha": 8}),
    "lr 1e-4": ("qlora", {"learning_rate": 1e-4}),
    "lr 2e-4": ("qlora", {"learning_rate": 2e-4}),
    "lr 5e-4": ("qlora", {"learning_rate": 5e-4}),  # as in 03 on a GPU, and then not trained again
    "lr 1e-3": ("qlora", {"learning_rate": 1e-3}),  # as in 03 on a CPU, likewise
    "half the batch, twice the steps": ("qlora", {"batch_size": 0.5, "max_steps": 2, "eval_every": 2, "warmup_steps": 2}),
    "seed 1": ("qlora", {"seed": 1}),
    "seed 2": ("qlora", {"seed": 2}),
}
FACTORS = ("batch_size", "max_steps", "eval_every", "warmup_steps")  # of these the row gives a factor, not a value


def changed(config: dict, changes: dict) -> dict:
    return config | {k: max(1, int(config[k] * v)) if k in FACTORS else v for k, v in changes.items()}


def train_row(folder, name, method, config, data_hash, rows, dev, test):
    """{"items": per query on the pool, "facts"} of one row."""
    cfg = SimpleNamespace(**config)
    rows = training.shuffled(rows, cfg.seed) if name == "shuffled pairs" else rows
    model, facts, _ = training.train(cfg, rows, dev, folder / "checkpoints", data_hash, lambda **values: None, method)
    asked = task.pool(test)
    items = task.evaluate(asked, task.embed_task(model, asked, cfg.eval_batch_size))
    trainer_common.remove(folder / "checkpoints")
    return {"items": items, "facts": facts}


def main(run):
    if trainer_common.PROCESSES > 1:  # a row is one training and one evaluation after the other, and its cache has one writer
        raise SystemExit(f"ablations take one process, not {trainer_common.PROCESSES}: start them without torchrun")
    data, trained = run.load("01_data"), run.load("03_train")
    run.load("04_eval")
    names, data_hash = results.chosen(run.cfg.only, list(ROWS)), results.result_hash(data)
    rows, dev, test = (results.read_rows(run.artifact("01_data", f"{s}.jsonl")) for s in ("train", "dev", "test"))
    stored = json.loads(run.artifact("02_baseline", "items_base.json").read_text())
    base = stored[f"{models.label(run.cfg.precision)} base"]["pool"]
    tuned = json.loads(run.artifact("04_eval", "items_tuned.json").read_text())["pool"]
    facts = {r["metric"]: r["value"] for r in trained["rows"] if r["table"] == "training"}
    done, documents = {"as in 03": {"items": tuned, "facts": facts}}, len(task.pool(test).documents)
    for name in names:
        method, config = ROWS[name][0], changed(trained["config"], ROWS[name][1])
        if config == trained["config"] and method == "qlora" and name != "shuffled pairs":
            continue  # that is what 03 trained
        folder = run.folder / "ablations" / re.sub(r"\W+", "-", name)
        make = partial(train_row, folder, name, method, config, data_hash, [dict(r) for r in rows], dev, test)
        done[name] = results.cached(folder / "row.json", [config, method, data_hash], make)
        run.log(row=name.replace(" ", "_"), dev_mrr=done[name]["facts"]["dev_mrr_kept"], test_mrr=task.mean(done[name]["items"], "mrr@10"))
    table = []
    for name, row in done.items():
        table += task.metric_rows("ablation", name, row["items"], documents, ("mrr@10", "ndcg@10"))
        table += task.delta_rows("ablation minus base", base, row["items"], ("mrr@10",), model=name)
        table += task.delta_rows("ablation minus 03", tuned, row["items"], ("mrr@10",), model=name) if name != "as in 03" else []
        table += [{"table": "ablation facts", "model": name, "metric": k, "value": row["facts"][k]} for k in
                  ("trainable_parameters", "dev_mrr_before", "dev_mrr_kept", "dev_mrr_last", "kept_step", "steps")]
    run.save(table)


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
