"""Question: how good is the model before training, and how far does a good prompt alone get it?

A process of its own, in which no adapter exists: a "before" that was measured with an adapter attached is the
costliest mistake of such comparisons.

Reads   runs/<run>/task1_decoder/{test,train,choice}.jsonl of 01
Writes  results/<run>/task1_decoder/02_baseline.json,
        runs/<run>/task1_decoder/items_base.json (per item, for 04)
Needs   about 5 min and 3 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import json

from common import models, stats
from task1_decoder import task


def main(run):
    cfg = run.cfg
    run.load("01_data")
    tables = task.tables_of(run)  # first, so that a wrong BENCHMARK= is reported before the work
    tokenizer = models.load_tokenizer(cfg.model)
    model = models.load_decoder(cfg.model, cfg.precision, cfg.compute, cfg.double_quant)
    size = models.size(model)
    sizes = {"parameters": size["parameters"], f"bytes_{cfg.precision}": size["bytes"],
             "bytes_16bit": 2 * size["parameters"]}
    run.log(**{name: value / 1e6 for name, value in sizes.items()}, unit="million")

    zero_shot = task.measure(model, tokenizer, run)
    test = run.rows("test")
    del model
    # 4 bits alone make a model worse, so a tuned one is judged against 16 bits, and against good prompts
    plain = models.compute_name(cfg.compute)
    model = models.load_decoder(cfg.model, plain)
    unquantised = task.measure(model, tokenizer, run) if cfg.precision != plain else zero_shot
    few_shot = task.score(model, tokenizer, test, cfg, task.trained_texts(run), task.shots_of(run))
    run.log(measured="3-shot", nll_per_token=task.nll(few_shot))

    measured = {"base": zero_shot, f"{plain} base": unquantised,
                f"{plain} base 3-shot": {"heldout": few_shot}}
    results.write_atomic(run.folder / "items_base.json", json.dumps(measured))
    rows = stats.facts("size", "base", sizes)
    for name, own in measured.items():
        for table, items in own.items():
            rows += stats.rows_of(table, name, items, tables.get(table, task.ACCURACY))
    run.save(rows, artifacts=["items_base.json"])
    run.log(base_nll_per_token=task.nll(zero_shot["heldout"]), n=len(test))


if __name__ == "__main__":
    runner.start(main, task.Config, task.PROFILES)
