"""Question: which of the choices in 03 mattered, how far do seeds lie apart, and what does each way to train cost?

Every row is a training of its own with one thing changed, scored once on the held-out rows of 04. The cost table trains a few steps in
every combination of {4 bits, bf16} x {checkpointing off, on}, on an accelerator only: there a process can forget an earlier peak. Not
numbered, because nothing depends on it; `make ablations` runs it. Interrupted, the same command goes on with the row it was at.

Reads   the knobs and data of 01-04 of the same run
Writes  results/<run>/task1_decoder/ablations.json, runs/<run>/task1_decoder/ablations/
Needs   about 4 min a row, 20 min in all, and 3 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # a wrong one is said before the seconds that the next imports take

import gc
import json
import re
import shutil
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

from common import models  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

import torch

from common import stats, trainer
from task1_decoder import task, training


@dataclass(frozen=True)
class Config(task.Config):
    # Names of the rows to train, separated by ";" ("" = all): for one more look at one of them.
    only: str = ""
    # Steps of each training of the cost table; 0 = no such table.
    cost_steps: int = 0
    # Rows a step in the cost table.
    cost_rows: str = "4 32"


PROFILES = {
    "smoke": dict(
        only="bf16 LoRA",  # the one that takes another path through the code
    ),
    "cpu": dict(),
    "gpu": dict(
        cost_steps=12,  # the median of them
        cost_rows="4 32 128",  # 128 show where arithmetic, not the launch of kernels, takes the time
    ),
}
COST = "cost"  # the table of that name
# name -> knobs changed; what 03 itself trained is the row they are compared with
ROWS = {
    "bf16 LoRA": {"precision": "bf16"},  # QLoRA's claim: the same quality without the 4 bits
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "rank 4": {"lora_r": 4, "lora_alpha": 8},
    "LoRA on attention only": {"target_modules": r".*(attn|attention)\..*"},
}


def train_row(folder, config, data_hash, pool, dev, test):
    """{"items": NLL per held-out row, "facts"} of one row."""
    cfg = SimpleNamespace(**config)
    model, facts, _ = training.train(cfg, pool, dev, folder / "checkpoints", [data_hash], lambda **values: None)
    items = task.loss_only(model, models.load_tokenizer(cfg.model), test, cfg)
    trainer.remove(folder / "checkpoints")
    return {"items": items, "facts": facts}


def matmul_peak(size: int = 8192, times: int = 20) -> float:
    """FLOP/s of a bf16 product of two random size x size matrices: what this device reaches, against which utilisation is stated."""
    a, b = (torch.randn(size, size, device=models.device(), dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(times):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / sorted(seconds)[times // 2]


def model_flops(model, rows: int, tokens: int, kept: int) -> float:
    """Floating-point operations one LoRA step has to do: 2 per weight and token forward, 2 backward to the activations, none for the
    gradients of frozen weights; the head only on `kept` columns a row. Adapter, attention scores (under 1 % at 130 tokens) and what
    checkpointing computes twice are not counted, so utilisation is that of the model's own work (MFU: Chowdhery et al. 2022)."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in name}
    weights = sum((m.weight.quant_state.shape if hasattr(m.weight, "quant_state") else m.weight.shape).numel()
                  for name, m in linear.items() if not name.endswith("lm_head"))
    return 4 * weights * tokens + 4 * model.config.hidden_size * model.config.vocab_size * rows * kept


def cost_table(run, config, pool, dev):
    """Rows {"table": "cost", "model": "nf4, checkpointing off, 32 rows", ...}: peak memory predicted and measured, speed, utilisation."""
    table, peak = [], matmul_peak()
    for precision in ("nf4", "bf16"):
        for checkpointing in (False, True):
            for size in map(int, run.cfg.cost_rows.split()):
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                steps = run.cfg.cost_steps
                changes = {"precision": precision, "gradient_checkpointing": "on" if checkpointing else "off", "batch_size": size, "max_steps": steps,
                           "eval_every": 10 * steps, "warmup_steps": 1, "rows_per_pass": size}
                cfg, folder = SimpleNamespace(**config | changes), run.folder / "ablations" / "cost"
                model, facts, _ = training.train(cfg, pool, dev[:4], folder, [], lambda **values: None)
                shutil.rmtree(folder)
                tokens, kept = facts["trained_tokens"] / steps, facts["label_tokens"] / facts["trained_rows"]
                flops = model_flops(model, size, tokens, kept) / facts["median_step_seconds"]
                found = {"predicted_peak_bytes": facts["predicted_total_bytes"], "measured_peak_bytes": facts["measured_peak_bytes"],
                         "step_seconds": facts["median_step_seconds"], "tokens_per_second": tokens / facts["median_step_seconds"],
                         "model_flops_per_second": flops, "matmul_flops_per_second": peak, "utilisation": flops / peak}
                name = f"{precision}, checkpointing {'on' if checkpointing else 'off'}, {size} rows"
                table += [{"table": "cost", "model": name, "precision": precision, "checkpointing": checkpointing, "batch": size,
                           "metric": metric, "value": value} for metric, value in found.items()]
                run.log(cost=name.replace(" ", "_"), GiB=found["measured_peak_bytes"] / 2**30, utilisation=found["utilisation"])
                del model
    return table


def main(run):
    data, trained = run.load("01_data"), run.load("03_train")
    run.load("04_eval")
    names, data_hash = results.chosen(run.cfg.only, [*ROWS, *[COST] * bool(run.cfg.cost_steps)]), results.result_hash(data)
    if run.cfg.cost_steps and models.device().type != "cuda":
        raise SystemExit(f"cost_steps={run.cfg.cost_steps}: the cost table needs an accelerator, a process on a CPU never forgets its peak")
    pool, dev, test = (results.read_rows(run.artifact("01_data", f"{s}.jsonl")) for s in ("train", "dev", "test"))
    table, cost = [], [trained["config"], run.cfg.cost_steps, run.cfg.cost_rows, data_hash]
    if COST in names:
        table = results.cached(run.folder / "ablations" / "cost.json", cost, lambda: {"rows": cost_table(run, trained["config"], pool, dev)})["rows"]
    base = json.loads(run.artifact("02_baseline", "items_base.json").read_text())["zero-shot"]["heldout"]
    tuned = json.loads(run.artifact("04_eval", "items_tuned.json").read_text())["heldout"]
    facts = {r["metric"]: r["value"] for r in trained["rows"] if r["table"] == "training"}
    done = {"as in 03": {"items": tuned, "facts": facts}}
    for name in (n for n in names if n != COST):
        folder, config = run.folder / "ablations" / re.sub(r"\W+", "-", name), trained["config"] | ROWS[name]
        done[name] = results.cached(folder / "row.json", [config, data_hash], partial(train_row, folder, config, data_hash, pool, dev, test))
        gc.collect()
        run.log(row=name.replace(" ", "_"), dev_nll=done[name]["facts"]["dev_nll_best"])
    (before, weights), (reference, _) = (task.column(items, "nll_per_token") for items in (base, tuned))
    for name, row in done.items():
        values, _ = task.column(row["items"], "nll_per_token")
        table.append({"table": "ablation", "model": name, "metric": "nll_per_token", **stats.ratio_interval(values, weights)})
        for what, other in (("base", before), ("03", reference)):
            if name != "as in 03" or what == "base":
                delta = stats.paired_delta(other, values, weights)
                table.append({"table": f"ablation minus {what}", "model": name, "metric": "nll_per_token", **delta,
                              "verdict": stats.verdict(delta, False)})
        table += [{"table": "ablation facts", "model": name, "metric": k, "value": row["facts"][k]}
                  for k in ("trainable_parameters", "dev_nll_best", "steps", "tokens_per_second")]
    run.save(table)


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
