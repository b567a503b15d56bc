"""Question: what changed, for better and worse, and is it the weights that did it?

Same items, same functions, same batch size as 02, in a fresh process that loads the adapter from disk.

Reads   items_base.json of 02, adapter/ of 03
Writes  results/<run>/task1_decoder/04_eval.json, runs/<run>/task1_decoder/{items_tuned.json,examples.md}
Needs   about 4 min and 2 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # a wrong one is said before the seconds that the next imports take

import json
from dataclasses import dataclass

from common import models  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

import torch
from peft import PeftModel

from common import stats
from task1_decoder import task


@dataclass(frozen=True)
class Config(task.Config):
    # Items of the attribution table (4 and 16 bits, with and without adapter, merged): three more passes for the 16-bit rows.
    n_attribution: int = 80


PROFILES = {
    "smoke": dict(
        n_attribution=8,  # enough for every code path
    ),
    "cpu": dict(),
    "gpu": dict(
        n_attribution=1000,  # all test items
    ),
}
HEADLINE = ("nll_per_token", "bits_per_byte", "chrf", "rouge_l", "stopped")


def attribution(run, tokenizer, adapter, test, scored):
    """NLL rows on the same items for {as trained, unquantised} x {base, adapter}, and for the adapter merged into the latter.

    `scored`: {name: items} of the base and the tuned model as trained, which 02 and this script have scored already. Unquantised is 16
    bits, or 32 where `compute` is fp32. Saves the merged model.
    """
    cfg, items, trained = run.cfg, dict(scored), models.label(run.cfg.precision)
    plain = models.compute_name(cfg.compute)
    model = PeftModel.from_pretrained(models.load_decoder(cfg.model, plain), adapter).eval()
    with model.disable_adapter():
        items[f"{plain} base"] = task.loss_only(model, tokenizer, test, cfg)
    items[f"{plain} + adapter"] = task.loss_only(model, tokenizer, test, cfg)
    merged = model.merge_and_unload()  # into 16 bits: merged into 4 bits, rounding can swamp the adapter
    items[f"{plain} merged"] = task.loss_only(merged, tokenizer, test, cfg)
    merged.save_pretrained(run.folder / "merged")
    tokenizer.save_pretrained(run.folder / "merged")
    rows = []
    for name, found in items.items():
        values, weights = task.column(found, "nll_per_token")
        reference, _ = task.column(items[f"{trained} base" if "base" in name else f"{trained} + adapter"], "nll_per_token")
        rows.append({"table": "attribution", "model": name, "metric": "nll_per_token", **stats.ratio_interval(values, weights)})
        rows.append({"table": "attribution", "model": name, "metric": f"minus_{cfg.precision}", **stats.paired_delta(reference, values, weights)})
    best_base, tuned = (task.column(items[name], "nll_per_token")[0] for name in (f"{plain} base", f"{trained} + adapter"))
    rows.append({"table": "attribution", "model": f"{trained} + adapter", "metric": f"minus_{plain}_base",
                 **stats.paired_delta(best_base, tuned, weights)})
    return rows


def extremes(before, after, test, k=3):
    """The k largest gains and losses in chrF, ties broken by NLL, then id: a rule, not a choice. Names and figures only."""
    packages = {row["id"]: row["name"] for row in test}
    order = sorted(range(len(after)), key=lambda i: (after[i]["chrf"] - before[i]["chrf"], before[i]["nats"] - after[i]["nats"], i))
    return [{"table": "examples", "model": kind, "metric": "chrf_gain", "item": packages[after[i]["id"]], "id": after[i]["id"],
             "value": after[i]["chrf"] - before[i]["chrf"], "chrf_before": before[i]["chrf"], "chrf_after": after[i]["chrf"],
             "nll_before": before[i]["nats"] / before[i]["tokens"], "nll_after": after[i]["nats"] / after[i]["tokens"],
             "output_before": before[i]["text"], "output_after": after[i]["text"]}
            for kind, chosen in (("win", order[::-1][:k]), ("loss", order[:k])) for i in chosen]


def write_examples(run, rows, test):
    """Full texts, for the reader's own machine only: they quote the installed packages."""
    by_id, text = {row["id"]: row for row in test}, ["# The largest gains and losses in full\n"]
    for row in rows:
        source = by_id[row["id"]]
        text.append(f"## {row['model']}: {source['name']} (chrF {row['chrf_before']:.0f} -> {row['chrf_after']:.0f})\n\n"
                    f"```python\n{source['prompt']}\n```\n\n- reference: {source['completion']}\n- before: {row['output_before']}\n"
                    f"- after: {row['output_after']}\n")
    results.write_atomic(run.folder / "examples.md", "\n".join(text))


def main(run):
    cfg = run.cfg
    for step in ("01_data", "02_baseline", "03_train"):
        run.load(step)
    stored = json.loads(run.artifact("02_baseline", "items_base.json").read_text())
    before, few_shot = stored["zero-shot"], stored["3-shot"]
    adapter = str(run.artifact("03_train", "adapter"))
    test = results.read_rows(run.artifact("01_data", "test.jsonl"))
    tokenizer = models.load_tokenizer(cfg.model)
    model = PeftModel.from_pretrained(models.load_decoder(cfg.model, cfg.precision, cfg.compute, cfg.double_quant), adapter).eval()
    after = task.measure(model, tokenizer, run)
    del model
    torch.cuda.empty_cache()

    results.write_atomic(run.folder / "items_tuned.json", json.dumps(after))
    rows = task.rows_of(before, "base") + task.rows_of(after, "tuned") + task.delta_rows(before, after)
    shot = task.delta_rows({"heldout": few_shot}, {"heldout": after["heldout"][:len(few_shot)]})
    rows += [row | {"model": "tuned minus base 3-shot"} for row in shot]
    general = task.delta_rows(stored["unquantised"], {name: after[name] for name in stored["unquantised"]})
    rows += [row | {"model": f"tuned minus {models.compute_name(cfg.compute)} base"} for row in general]
    rows = [row | {"table": "headline"} for row in rows if row["table"] == "heldout" and row["metric"] in HEADLINE
            and row["model"] in ("base", "tuned", "delta")] + rows
    n, trained = cfg.n_attribution, models.label(cfg.precision)
    rows += attribution(run, tokenizer, adapter, test[:n], {f"{trained} base": before["heldout"][:n],
                                                             f"{trained} + adapter": after["heldout"][:n]})
    examples = extremes(before["heldout"], after["heldout"], test)
    write_examples(run, examples, test)
    basket = [{"table": "basket_prompts", "model": "side by side", "kind": a["kind"], "prompt": a["prompt"], "reference": a["reference"],
               "before": {k: b[k] for k in ("text", "stopped", "new_tokens", "repetition", "copied")},
               "after": {k: a[k] for k in ("text", "stopped", "new_tokens", "repetition", "copied")}}
              for b, a in zip(before["basket"], after["basket"])]
    run.save(rows + examples + basket, artifacts=["items_tuned.json", "examples.md", "merged"])
    head = next(r for r in rows if r["table"] == "headline" and r["model"] == "delta")
    run.log(delta_nll_per_token=head["value"], lo=head["lo"], hi=head["hi"], p=head["p"], n=head["n"], verdict=head["verdict"])


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
