"""Question: which of the choices in 03 mattered, and would pairs that do not belong together have done as
well?

Every row is a training of its own with one thing changed, scored once on the queries of 04. Not numbered,
because nothing depends on it; `make ablations` runs it. Interrupted, the same command goes on with the row it
was at.

Reads   the knobs and data of 01-04 of the same run
Writes  results/<run>/task2_encoder/ablations.json, runs/<run>/task2_encoder/ablations/
Needs   about 3 min a row, 35 min in all, and 3 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import knobs, results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import importlib
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial

from common import stats, training
from task2_encoder import task

step = importlib.import_module("task2_encoder.03_train")


@dataclass(frozen=True)
class Config(task.Config):
    # Names of the rows to train, separated by ";" ("" = all): to repeat or add single ones.
    only: str = ""


PROFILES = {
    "smoke": dict(
        only="shuffled pairs;full fine-tune, lr 1e-4",  # the two that take another path through the code
    ),
    "cpu": dict(),
    "gpu": dict(),
}
CONTROL = "shuffled pairs"
SEEDS = ("as in 03", "seed 1", "seed 2")
FACTS = ("trainable_parameters", "dev_mrr_kept", "dev_mrr_last", "kept_step", "steps")


def ablations(cfg) -> dict:
    """{name: knobs of the training `cfg` changed, and perhaps the "method" of 03's `load_model`}."""
    doubled = {name: 2 * getattr(cfg, name) for name in ("max_steps", "eval_every", "warmup_steps")}
    return {
        CONTROL: {},
        "LoRA on the fp32 base": {"method": "lora"},
        # a tenth of LoRA's on a CPU, a fifth on a GPU; 2e-5 is usual for longer runs
        "full fine-tune, lr 1e-4": {"method": "full", "learning_rate": 1e-4},
        "batches across packages": {"within_package": False},
        "rank 4": {"lora_r": 4, "lora_alpha": 8},
        "lr 1e-4": {"learning_rate": 1e-4},
        "lr 2e-4": {"learning_rate": 2e-4},
        "lr 5e-4": {"learning_rate": 5e-4},
        "lr 1e-3": {"learning_rate": 1e-3},
        "half the batch, twice the steps": {"batch_size": cfg.batch_size // 2, **doubled},
        "seed 1": {"seed": 1},
        "seed 2": {"seed": 2},
    }


def shuffled(rows: list, seed: int) -> list:
    """Every anchor with the positive of another row of its package: the same texts, but no pair belongs
    together."""
    rng, members = random.Random(seed), defaultdict(list)
    for i, row in enumerate(rows):
        members[row["package"]].append(i)
    mixed = list(rows)
    for own in members.values():
        for i, j in zip(own, rng.sample(own, len(own))):
            mixed[i] = rows[i] | {"positive": rows[j]["positive"], "group": rows[i]["id"]}
    return mixed


def main(run):
    data, trained = run.load("01_data"), run.load("03_train")
    run.load("04_eval")
    rows, dev, test = map(run.rows, ("train", "dev", "test"))
    asked, data_hash = task.searches(test, run.cfg), results.result_hash(data)
    asked = {name: asked[name] for name in task.SHARED if name in asked}
    headlines = [name for name in ("pool", "questions") if name in asked]
    task.track_questions(run)
    stored = json.loads(run.artifact("02_baseline", "items_base.json").read_text())
    base = stored["fp32 base"]
    tuned = json.loads(run.artifact("04_eval", "items_tuned.json").read_text())
    as_trained = knobs.config_of(step.Config, trained["config"])
    kept = {row["metric"]: row["value"] for row in trained["rows"] if row["table"] == "training"}

    def train_row(folder, cfg, method, pairs):
        place = folder / "checkpoints"
        model, facts, _ = step.train(cfg, pairs, dev, place, data_hash, lambda **_: None, method)
        items, _ = task.measure(model, asked, cfg)
        training.remove(place)
        return {"items": items, "facts": facts}

    done, possible = {"as in 03": {"items": tuned, "facts": kept}}, ablations(as_trained)
    for name in knobs.chosen(run.cfg.only, list(possible)):
        method = possible[name].pop("method", "qlora")
        cfg = replace(as_trained, **possible[name])
        folder = run.folder / "ablations" / re.sub(r"\W+", "-", name)
        if cfg == as_trained and method == "qlora" and name != CONTROL:
            continue  # that is what 03 trained
        pairs = shuffled(rows, cfg.seed) if name == CONTROL else rows
        done[name] = results.cached(folder / "row.json", [vars(cfg), method, data_hash],
                                    partial(train_row, folder, cfg, method, pairs))
        run.log(row=name.replace(" ", "_"), test_mrr=task.mean_mrr(done[name]["items"]["pool"]))

    table = []
    for name, row in done.items():
        for search in headlines:
            items, which = row["items"][search], {"kind": search}
            table += stats.rows_of("ablation", name, items, [task.MRR], **which)
            table += stats.delta_rows("ablation minus base", name, base[search], items, [task.MRR], **which)
            if name != "as in 03":
                table += stats.delta_rows("ablation minus 03", name, tuned[search], items, [task.MRR],
                                          **which)
        table += stats.facts("ablation facts", name, {fact: row["facts"][fact] for fact in FACTS})
    stats.holm(table)
    table += stats.over_seeds([row for row in table if row["table"] == "ablation minus base"
                               and row["name"] in SEEDS])  # the differences of 04 in every seed
    run.save(table)


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
