"""Question: what changed, for better and worse, and is it the weights that did it?

Same items, same functions, same batch size as 02, in a fresh process that loads the adapter from disk.

Reads   items_base.json of 02, adapter/ of 03
Writes  results/<run>/task1_decoder/04_eval.json,
        runs/<run>/task1_decoder/{items_tuned.json,examples.md,merged/}
Needs   about 4 min and 3 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import json
from dataclasses import dataclass, replace

import torch
from peft import PeftModel

from common import models, stats
from pipeline import card
from sources import corpus
from task1_decoder import scoring, task


@dataclass(frozen=True)
class Config(task.Config):
    # Items of the attribution table (4 and 16 bits, with and without adapter, merged): three more passes
    # over them for the 16-bit rows.
    n_attribution: int = 80


PROFILES = {
    "smoke": dict(n_attribution=8),
    "cpu": dict(),
    "gpu": dict(n_attribution=1000),
}


def compared(name: str, before: dict[str, list[dict]], after: dict[str, list[dict]],
             tables: dict = task.TABLES) -> list[dict]:
    """Result rows of `after - before`, paired by item, for every table of `before`."""
    rows = []
    for table, items in before.items():
        metrics = tables.get(table, task.ACCURACY)
        rows += stats.delta_rows(table, name, items, after[table], metrics)
    return rows


def attribution(run, tokenizer, adapter: str, test: list[dict], before: list[dict], after: list[dict]):
    """(NLL rows on the same items for {as trained, unquantised} x {base, adapter}, and for the merged model;
    what the merged model forgot, as from task.forgetting).

    `before` and `after`: items of the base and the tuned model as trained. Unquantised is 16 bits, or 32
    where `compute` is fp32. The adapter is merged into that, because rounding to 4 bits could swamp it, and
    the merged model is saved.
    """
    cfg, trained, plain = run.cfg, models.label(run.cfg.precision), models.compute_name(run.cfg.compute)
    examples = task.encode(tokenizer, test, cfg)

    def scored(model):
        return scoring.score_answers(model, tokenizer, examples, cfg.eval_batch_size)
    model = PeftModel.from_pretrained(models.load_decoder(cfg.model, plain), adapter).eval()
    with model.disable_adapter():
        base = scored(model)
    items = {f"{trained} base": before, f"{trained} + adapter": after, f"{plain} base": base,
             f"{plain} + adapter": scored(model)}
    merged = model.merge_and_unload()
    items[f"{plain} merged"] = scored(merged)
    forgot = task.forgetting(merged, tokenizer, run)
    merged.save_pretrained(run.folder / "merged")
    models.save_companions(merged, tokenizer, run.folder / "merged", examples)

    rows = []
    for name, own in items.items():
        reference = before if "base" in name else after
        rows += stats.rows_of("attribution", name, own, [task.NLL])
        minus = replace(task.NLL, name=f"minus_{cfg.precision}")
        rows += stats.delta_rows("attribution", name, reference, own, [minus])
    fairest = replace(task.NLL, name=f"minus_{plain}_base")
    return rows + stats.delta_rows("attribution", f"{trained} + adapter", base, after, [fairest]), forgot


def extremes(before: list[dict], after: list[dict], test: list[dict], k: int = 3) -> list[dict]:
    """The k largest gains and losses in chrF, ties broken by NLL, then by place, without the packages'
    texts.
    """
    gains = [new["chrf"] - old["chrf"] for old, new in zip(before, after)]
    order = sorted(range(len(gains)), key=lambda i: (gains[i], before[i]["nats"] - after[i]["nats"], i))
    rows = []
    for kind, chosen in (("win", order[::-1][:k]), ("loss", order[:k])):
        for i in chosen:
            row = {"table": "examples", "name": kind, "metric": "chrf_gain", "item": test[i]["name"],
                   "id": test[i]["id"], "value": gains[i]}
            for when, item in (("before", before[i]), ("after", after[i])):
                row |= {f"chrf_{when}": item["chrf"], f"nll_{when}": task.nll([item]),
                        f"output_{when}": item["text"]}
            rows.append(row)
    return rows


def examples_page(rows: list[dict], test: list[dict]) -> str:
    """The extremes with full texts, for the reader's own machine only: they quote the installed packages."""
    by_id, parts = {row["id"]: row for row in test}, ["# The largest gains and losses in full\n"]
    for row in rows:
        source = by_id[row["id"]]
        parts.append(f"## {row['name']}: {source['name']}\n\n"
                     f"chrF {row['chrf_before']:.0f} -> {row['chrf_after']:.0f}\n\n"
                     f"```python\n{source['prompt']}\n```\n\n- reference: {source['completion']}\n"
                     f"- before: {row['output_before']}\n- after: {row['output_after']}\n")
    return "\n".join(parts)


def basket_rows(run, before: list[dict], after: list[dict]) -> list[dict]:
    """Each prompt of the basket with both answers, side by side."""
    shown = ("text", "stopped", "new_tokens", "repetition", "copied")
    return [{"table": "basket_prompts", "name": "side by side", "prompt": row["prompt"],
             "before": {key: old[key] for key in shown}, "after": {key: new[key] for key in shown}}
            for row, old, new in zip(task.basket.prompts(run), before, after)]


def answers_changed(before: list[dict], after: list[dict]) -> list[dict]:
    """The general questions that one model answered and the other did not, with both answers."""
    asked = {row["id"]: row["prompt"] for row in task.manners.asked(0)}
    return [{"table": "answers", "name": "gained" if new["kept"] else "lost", "prompt": asked[new["id"]],
             "before": old["text"], "after": new["text"]}
            for old, new in zip(before, after) if old["kept"] != new["kept"]]


def main(run):
    cfg = run.cfg
    _, _, trained = (run.load(step) for step in ("01_data", "02_baseline", "03_train"))
    stored = json.loads(run.artifact("02_baseline", "items_base.json").read_text())
    adapter = str(run.artifact("03_train", "adapter"))
    test = run.rows("test")
    tokenizer = models.load_tokenizer(cfg.model)
    model = models.load_decoder(cfg.model, cfg.precision, cfg.compute, cfg.double_quant)
    model = PeftModel.from_pretrained(model, adapter).eval()
    after = task.measure(model, tokenizer, run)
    stats.refuse_unchanged(stored["base"], after)
    del model
    torch.cuda.empty_cache()
    results.write_atomic(run.folder / "items_tuned.json", json.dumps(after))

    measured = {"base": stored["base"], "tuned": after}
    tables = task.tables_of(run)
    rows = [row for name, own in measured.items() for table, items in own.items()
            for row in stats.rows_of(table, name, items, tables.get(table, task.ACCURACY))]
    rows += compared("delta", stored["base"], after, tables)
    plain = f"{models.compute_name(cfg.compute)} base"
    for name in (plain, f"{plain} 3-shot"):
        rows += compared(f"tuned minus {name}", stored[name], after, tables)
    # the headline: against whichever of them knows the held-out answers best
    best = task.best_base(stored)
    rows += stats.delta_rows("headline", f"tuned minus {best}", stored[best]["heldout"], after["heldout"],
                             [task.NLL], clusters=corpus.subpackages(test))
    head = rows[-1]
    rows += answers_changed(stored[plain]["manners"], after["manners"])
    n = cfg.n_attribution
    attributed, merged = attribution(
        run, tokenizer, adapter, test[:n], stored["base"]["heldout"][:n], after["heldout"][:n]
    )
    rows += attributed + compared(f"merged minus {plain}", {t: stored[plain][t] for t in merged}, merged)
    for table, items in merged.items():
        rows += stats.rows_of(table, "merged", items, tables[table])
    examples = extremes(stored["base"]["heldout"], after["heldout"], test)
    results.write_atomic(run.folder / "examples.md", examples_page(examples, test))
    rows += examples + basket_rows(run, stored["base"]["basket"], after["basket"])
    stats.holm(rows)
    card.write(run, trained, rows, "adapter", "merged")
    run.save(rows, artifacts=["items_tuned.json", "examples.md", "merged"])
    run.log(headline=head["name"].replace(" ", "_"), nll_per_token=head["value"], lo=head["lo"],
            hi=head["hi"], p=head["p"], n=head["n"], verdict=head["verdict"])


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
