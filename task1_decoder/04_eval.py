"""Question: what changed, for better and worse, and is it the weights that did it?

Same items, same functions, same batch size as 02, in a fresh process that loads the adapter from disk.

Reads   items_base.json of 02, adapter/ of 03
Writes  results/<run>/task1_decoder/04_eval.json, runs/<run>/task1_decoder/{items_tuned.json,examples.md}
Needs   about 4 min and 2 GB on 2 cores
"""

import json
from dataclasses import dataclass

from common import models  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

import torch
from peft import PeftModel

from common import results, stats
from task1_decoder import task


@dataclass(frozen=True)
class Config(task.Config):
    # As trained and as the baseline was measured.
    precision: str = "nf4"
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


def attribution(run, tokenizer, adapter, test, nf4):
    """NLL rows on the same items for {4 bit, 16 bit} x {base, adapter}, and for the adapter merged into the 16-bit base.

    `nf4`: {name: items} of the two 4-bit models, which 02 and this script have scored already. Saves the merged model.
    """
    cfg, items = run.cfg, dict(nf4)
    model = PeftModel.from_pretrained(models.load_decoder(cfg.model, "bf16"), adapter).eval()
    with model.disable_adapter():
        items["bf16 base"] = task.loss_only(model, tokenizer, test, cfg)
    items["bf16 + adapter"] = task.loss_only(model, tokenizer, test, cfg)
    merged = model.merge_and_unload()  # into 16 bits: merged into 4 bits, rounding can swamp the adapter
    items["bf16 merged"] = task.loss_only(merged, tokenizer, test, cfg)
    merged.save_pretrained(run.folder / "merged")
    tokenizer.save_pretrained(run.folder / "merged")
    rows = []
    for name, scored in items.items():
        values, weights = task.column(scored, "nll_per_token")
        reference, _ = task.column(items["NF4 base" if "base" in name else "NF4 + adapter"], "nll_per_token")
        rows.append({"table": "attribution", "model": name, "metric": "nll_per_token", **stats.ratio_interval(values, weights)})
        rows.append({"table": "attribution", "model": name, "metric": "minus_nf4", **stats.paired_delta(reference, values, weights)})
    best_base, tuned = (task.column(items[name], "nll_per_token")[0] for name in ("bf16 base", "NF4 + adapter"))
    rows.append({"table": "attribution", "model": "NF4 + adapter", "metric": "minus_bf16_base", **stats.paired_delta(best_base, tuned, weights)})
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
    model = PeftModel.from_pretrained(models.load_decoder(cfg.model, cfg.precision), adapter).eval()
    after = task.measure(model, tokenizer, run)
    del model
    torch.cuda.empty_cache()

    results.write_atomic(run.folder / "items_tuned.json", json.dumps(after))
    rows = task.rows_of(before, "base") + task.rows_of(after, "tuned") + task.delta_rows(before, after)
    shot = task.delta_rows({"heldout": few_shot}, {"heldout": after["heldout"][:len(few_shot)]})
    rows += [row | {"model": "tuned minus base 3-shot"} for row in shot]
    rows = [row | {"table": "headline"} for row in rows if row["table"] == "heldout" and row["metric"] in HEADLINE
            and row["model"] in ("base", "tuned", "delta")] + rows
    n = cfg.n_attribution
    rows += attribution(run, tokenizer, adapter, test[:n], {"NF4 base": before["heldout"][:n], "NF4 + adapter": after["heldout"][:n]})
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
