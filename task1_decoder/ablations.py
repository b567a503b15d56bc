"""Question: which choices in 03 mattered, how far do seeds lie apart, what does each way to train cost?

Every row is 03's training with one thing changed, scored once on the held-out rows of 04. The cost table
trains a few steps in every combination of {4 bits, bf16} x {checkpointing off, on}, on an accelerator only:
there a process can forget an earlier peak. Not numbered, because nothing depends on it. Interrupted, the
same command goes on with the row it was at.

Reads   the knobs and data of 01-04 of the same run
Writes  results/<run>/task1_decoder/ablations.json, runs/<run>/task1_decoder/ablations/
Needs   about 5 min a row, 40 min in all, and 4 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import knobs, results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import gc
import importlib
import json
import re
import shutil
import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers import TrainerCallback

from common import models, stats, training
from task1_decoder import rehearsal, scoring, task

script = importlib.import_module("task1_decoder.03_train")


@dataclass(frozen=True)
class Config(task.Config):
    # Names of the rows to train, separated by ";" ("" = all): for one more look at one of them.
    only: str = ""
    # Steps of each training of the cost table; 0 = no such table.
    cost_steps: int = 0
    # Rows a step in the cost table, separated by blanks.
    cost_rows: str = "4 32"


PROFILES = {
    "smoke": dict(only="bf16 LoRA"),  # it takes another path through the code
    "cpu": dict(),
    "gpu": dict(
        cost_steps=12,  # the median of them counts
        cost_rows="4 32 128",  # 128 show where arithmetic, not the launch of kernels, takes the time
    ),
}
LOFTQ = "LoftQ start"
# name -> knobs changed; what 03 itself trained is the row they are compared with
ROWS = {
    "bf16 LoRA": {"precision": "bf16"},  # QLoRA's claim: the same quality without the 4 bits
    LOFTQ: {},  # A x B begin as the best approximation of what 4 bits lost, not as 0
    "no rehearsal": {"rehearsal": 0.0},
    "prompts of 160 tokens": {"max_prompt_tokens": 160},  # 80 cut three functions of four
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "rank 4": {"lora_r": 4, "lora_alpha": 8},
    "LoRA on attention only": {"target_modules": r".*(attn|attention)\..*"},
}
SEEDS = ("as in 03", "seed 1", "seed 2")
COST = "cost"  # the table of that name
SHOWN = ("trainable_parameters", "dev_nll_best", "steps", "tokens_per_second")


def silent(**values):
    """No line per step: there would be hundreds."""


@torch.no_grad()
def loftq(cfg, model) -> None:
    """Start LoRA at what 4 bits have lost of each layer, by the best approximation of its rank (LoftQ, Li et
    al. 2023, arXiv:2310.08659, one iteration). PEFT's own needs CUDA and leaves out alpha / r."""
    whole = models.load_decoder(cfg.model, models.compute_name(cfg.compute))
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            lost = whole.get_submodule(name).weight.float() - dequantize_module_weight(layer.base_layer)
            rank, scale = layer.r["default"], layer.scaling["default"]
            u, s, v = torch.svd_lowrank(lost.float(), q=2 * rank, niter=4)
            root = (s[:rank] / scale).sqrt()
            layer.lora_B["default"].weight.copy_(u[:, :rank] * root)
            layer.lora_A["default"].weight.copy_((v[:, :rank] * root).T)


def train_row(run, name: str, cfg, data_hash: str, rows, dev, test) -> dict:
    """{"items" {table: items}, "stats"} of one training: the held-out NLL, and what was forgotten."""
    checkpoints = run.folder / "ablations" / slug(name) / "checkpoints"
    start, rehearsed = partial(loftq, cfg) if name == LOFTQ else None, rehearsal.rows(run, cfg)
    model, trained, _ = script.train(cfg, rows, dev, checkpoints, data_hash, silent, rehearsed, start)
    tokenizer = models.load_tokenizer(cfg.model)
    examples = task.encode(tokenizer, test, cfg)
    items = {"heldout": scoring.score_answers(model, tokenizer, examples, cfg.eval_batch_size),
             **task.forgetting(model, tokenizer, run)}
    training.remove(checkpoints)
    return {"items": items, "stats": trained}


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


class Clock(TrainerCallback):
    """Seconds of every step, until the accelerator is done with it."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def cost_rows(run, stored: dict, rows, dev) -> list[dict]:
    """Rows {"table": "cost", "name": "nf4, checkpointing off, 32 rows", ...}: peak memory, time, speed."""
    table, steps, folder = [], run.cfg.cost_steps, run.folder / "ablations" / "cost"
    sizes = map(int, run.cfg.cost_rows.split())
    for precision, checkpointing, size in product(("nf4", "bf16"), ("off", "on"), sizes):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cfg = knobs.config_of(
            script.Config, stored, precision=precision, gradient_checkpointing=checkpointing, batch_size=size,
            rows_per_pass=size, max_steps=steps, eval_every=10 * steps, warmup_steps=1,
            cuda_graphs=False)  # with 128 rows in bf16 their recordings would need a second 70 GiB
        clock = Clock()
        _, trained, _ = script.train(cfg, rows, dev[:4], folder, "", silent, callbacks=[clock])
        shutil.rmtree(folder)
        seconds = statistics.median(clock.seconds)
        values = {"predicted_peak_bytes": trained["predicted_total_bytes"],
                  "measured_peak_bytes": trained["measured_peak_bytes"], "step_seconds": seconds,
                  "tokens_per_second": trained["trained_tokens"] / steps / seconds}
        name = f"{precision}, checkpointing {checkpointing}, {size} rows"
        table += stats.facts("cost", name, values, precision=precision, batch=size,
                             checkpointing=checkpointing == "on")
        run.log(cost=name.replace(" ", "_"), GiB=values["measured_peak_bytes"] / 2**30, step_seconds=seconds)
    return table


def main(run):
    cfg, data, trained = run.cfg, run.load("01_data"), run.load("03_train")
    run.load("04_eval")
    names = knobs.chosen(cfg.only, [*ROWS, *[COST] * bool(cfg.cost_steps)])
    if cfg.cost_steps and models.device().type != "cuda":
        raise SystemExit(f"cost_steps={cfg.cost_steps}: the cost table needs an accelerator")
    rows, dev, test = map(run.rows, ("train", "dev", "test"))
    stored, data_hash, table = trained["config"], results.result_hash(data), []
    if stored["precision"] != "nf4":
        names = [name for name in names if name != LOFTQ]
    if COST in names:
        given = [stored, cfg.cost_steps, cfg.cost_rows, data_hash]
        table = results.cached(run.folder / "ablations" / "cost.json", given,
                               lambda: {"rows": cost_rows(run, stored, rows, dev)})["rows"]

    bases = json.loads(run.artifact("02_baseline", "items_base.json").read_text())
    plain, best = bases[f"{models.compute_name(cfg.compute)} base"], bases[task.best_base(bases)]["heldout"]
    as_in_03 = {
        "items": json.loads(run.artifact("04_eval", "items_tuned.json").read_text()),
        "stats": {row["metric"]: row["value"] for row in trained["rows"] if row["table"] == "training"},
    }
    done = {"as in 03": as_in_03}
    for name in [name for name in names if name != COST]:
        changed = knobs.config_of(script.Config, stored, **ROWS[name])
        path = run.folder / "ablations" / slug(name) / "row.json"
        done[name] = results.cached(path, [name, vars(changed), data_hash], partial(
            train_row, run, name, changed, data_hash, rows, dev, test))
        gc.collect()
        run.log(row=name.replace(" ", "_"), dev_nll=done[name]["stats"]["dev_nll_best"])
    for name, row in done.items():
        for kind, base in (("heldout", best), ("general", plain["general"]), ("manners", plain["manners"])):
            metrics, items = task.TABLES[kind][:1], row["items"][kind]
            table += stats.rows_of("ablation", name, items, metrics, kind=kind)
            table += stats.delta_rows("ablation minus base", name, base, items, metrics, kind=kind)
            if name != "as in 03":
                table += stats.delta_rows("ablation minus 03", name, as_in_03["items"][kind], items, metrics,
                                          kind=kind)
        table += stats.facts("ablation facts", name, {fact: row["stats"][fact] for fact in SHOWN})
    stats.holm(table)
    table += stats.over_seeds([row for row in table if row["table"] == "ablation minus base"
                               and row["name"] in SEEDS])  # the differences of 04 in every seed
    run.save(table)


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
