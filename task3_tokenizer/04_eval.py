"""Question: what do the new tokens know after each stage, what did they cost, and is any of them worth having?

Every checkpoint is opened from disk as any user would open it. The comparison that counts is with the control, which saw the same texts in
the same stages spelled as before; against the untrained base alone, all training would look like a success of the new tokens.

Reads   items_base.json of 02, {new,control}/ and known/ of 03
Writes  results/<run>/task3_tokenizer/04_eval.json, runs/<run>/task3_tokenizer/{items.json,cards.md}
Needs   about 5 min and 8 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # a wrong one is said before the seconds that the next imports take

import gc
import json
import math
import time
from dataclasses import dataclass

from common import models, stats  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

from transformers import AutoTokenizer

from task3_tokenizer import calibration, cards, embeddings, intrinsic, task


@dataclass(frozen=True)
class Config(task.Config):
    # Windows, every k-th, on which other first values of the rows are compared before any training: they differ by more than their intervals.
    n_inits: int = 64
    # Held-out beginnings per term that the model continues: does it write the term, and with which tokens?
    n_continued: int = 3


PROFILES = {
    "smoke": dict(
        n_inits=8,  # proves the path
        n_continued=1,  # same
    ),
    "cpu": dict(),
    "gpu": dict(
        n_inits=2000,  # all
        n_continued=10,  # seconds
    ),
}
SPELLED = ("init", "a", "c2")  # where the new model also reads each term by its old pieces: before, rows alone, in the end


def continued(model, tokenizer, uses, ids_of_terms, n):
    """Of held-out beginnings right before a term: how often it is written, and by its new id or by old pieces; ids that re-encode alike."""
    seen, chosen = {}, []
    for row in uses:
        seen[row["term"]] = seen.get(row["term"], 0) + 1
        chosen += [row] if seen[row["term"]] <= n else []
    written = task.go_on(model, tokenizer, [row["text"][:row["start"] - 1] for row in chosen], 8)
    right, by_id, same = 0, 0, 0
    for row, ids in zip(chosen, written):
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        hit = text.startswith(f" {row['term']}") and not text[len(row["term"]) + 1:][:1].isalnum()
        right += hit
        by_id += hit and ids[0] == ids_of_terms.get(row["term"])
        same += task.ids_of(tokenizer, text) == ids
    return {"continued": len(chosen), "term_written": right, "term_written_by_new_id": by_id, "re_encodes_alike": same}


def speed(cfg, model, tokenizer, old, uses):
    """Bytes per second of reading the same windows with new tokens and as spelled before, in turns, three times; the model is warm."""
    size, spent = sum(len(row["text"].encode()) for row in uses), {"new tokens": 0.0, "old pieces": 0.0}
    for _ in range(3):
        for name, spelling in (("new tokens", tokenizer), ("old pieces", old)):
            started = time.time()
            task.score(model, spelling, uses, cfg.eval_batch_size)
            spent[name] += time.time() - started
    return [{"table": "speed", "model": name, "metric": "bytes_per_second", "value": 3 * size / seconds} for name, seconds in spent.items()]


def inits(cfg, run, tokenizer, splits, new_ids, uses, texts):
    """Bits per byte and over-use of every way to initialise, before any training."""
    source, table = run.artifact("03_train", "new/init"), []
    model = models.load_decoder(str(source), models.compute_name(cfg.compute))
    free = [row for row in texts if row["set"] == ("free" if any(r["set"] == "free" for r in texts) else "general")]
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    old = [layer.weight[:min(splits)].detach().clone() for layer in layers]
    methods = [m for m in embeddings.INITS if not model.config.tie_word_embeddings or "piece" not in m or m == "mean of pieces"]
    for method in methods:
        embeddings.initialise(model, splits, method, cfg.seed, old)
        items = {"uses": task.score(model, tokenizer, uses, cfg.eval_batch_size, new_ids),
                 "free": task.score(model, tokenizer, free, cfg.eval_batch_size, new_ids)}
        for row in task.rows_of(items, method):
            if row["metric"] in ("bits_per_byte", "term_bits", "new_token_mass"):
                table.append(row | {"metric": f"{row['table']} {row['metric']}", "table": "inits"})
    return table


def main(run):
    cfg = run.cfg
    for step in ("01_data", "02_baseline", "03_train"):
        run.load(step)
    terms, extended = run.artifact("01_data", "terms.json"), run.artifact("01_data", "tokenizer")
    lexicon = task.lexicon(cfg.model, terms, extended)
    uses, texts, known = (results.read_rows(run.artifact("01_data", f"{name}.jsonl")) for name in ("uses", "texts", "known"))
    base = json.loads(run.artifact("02_baseline", "items_base.json").read_text(encoding="utf-8"))
    old, splits, words = lexicon.old, lexicon.splits, intrinsic.whole_words(lexicon.old)
    items, table, looks, definitions = {"base": base["measured"]}, [], {}, {}

    for arm in ("new", "control"):
        for stage in ("init", *task.STAGES) if arm == "new" else task.STAGES:  # the control before training is the base
            name, folder = f"{arm} {stage}", run.artifact("03_train", f"{arm}/{stage}")
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
            model = models.load_decoder(str(folder), models.compute_name(cfg.compute))
            new_ids = list(splits) if arm == "new" else []
            both = arm == "new" and stage in SPELLED
            items[name] = task.measure(model, tokenizer, run, new_ids, old if both else None)
            table += task.rows_of(items[name], name, stage=stage)
            if arm == "new":
                looks[stage] = intrinsic.look(model, tokenizer, lexicon.chosen, lexicon.ids, words, cfg.seed)
            if both:
                share = [math.exp(-o["term_nats"]) / (math.exp(-n["term_nats"]) + math.exp(-o["term_nats"]))
                         for n, o in zip(items[name]["uses"], items[name]["uses, old pieces"])]
                table.append({"table": "leak", "model": name, "stage": stage, "metric": "share_of_probability_on_old_pieces",
                              **stats.ratio_interval(share, [1] * len(share))})
            if stage in ("init", "c2"):
                found = continued(model, tokenizer, uses, lexicon.ids if arm == "new" else {}, cfg.n_continued)
                table += [{"table": "continued", "model": name, "metric": k, "value": v} for k, v in found.items()]
            if stage == "c2":
                definitions[arm] = task.define(model, tokenizer, list(lexicon.ids), cfg)
                table += speed(cfg, model, tokenizer, old, uses[::8]) if arm == "new" else []
            run.log(scored=name.replace(" ", "_"), bits_per_byte=next(r["value"] for r in table if (r["table"], r["model"]) == ("uses", name)))
            del model
            gc.collect()

    for stage in task.STAGES:
        new, control = items[f"new {stage}"], items[f"control {stage}"]
        for kind in control:
            for metric in ("bits_per_byte", "term_bits") if kind == "uses" else ("bits_per_byte",):
                table += [task.delta_row(f"minus control: {kind}", f"new {stage}", metric, control[kind], new[kind]),
                          task.delta_row(f"minus base: {kind}", f"new {stage}", metric, items["base"][kind], new[kind])]
        if stage == list(task.STAGES)[-1]:
            table = [row | {"in_verdict": True} if row["model"] == f"new {stage}" and row["table"].startswith("minus") else row for row in table]
        if stage in SPELLED:
            table.append(task.delta_row("id minus old pieces", f"new {stage}", "after_bits_per_byte", new["uses, old pieces"], new["uses"]))
    for kind, read in (("uses", uses), ("domain", [r for r in texts if r["set"] == "domain"])):
        if n_words := sum(len(r["text"].split()) for r in read):
            before, after = (sum(i["tokens"] for i in items[name][kind]) for name in ("base", "new c2"))
            table.append({"table": "saved", "model": kind, "metric": "tokens_per_1000_words", "value": 1000 * (before - after) / n_words,
                          "before": 1000 * before / n_words, "after": 1000 * after / n_words, "n": n_words})

    for stage, found in looks.items():
        for side in ("input", "output"):
            mine = [f for f in found if f["side"] == side]
            first = [f for f in looks["init"] if f["side"] == side]
            for metric in ("anchors", "negatives", "anchor_rank", "negative_rank", "norm"):
                have = [k for k, f in enumerate(mine) if f[metric] is not None]
                if len(have) < 2:
                    continue
                values = [mine[k][metric] for k in have]
                table.append({"table": "intrinsic", "model": side, "stage": stage, "metric": metric,
                              **stats.ratio_interval(values, [1] * len(values))})
                if stage != "init":
                    table.append({"table": "intrinsic minus init", "model": side, "stage": stage, "metric": metric,
                                  **stats.paired_delta([first[k][metric] for k in have], values)})
    new_ids, n = list(splits), cfg.n_inits
    tokenizer = AutoTokenizer.from_pretrained(run.artifact("03_train", "new/c2"))
    step = math.ceil(len(uses) / n)  # every k-th, so that all terms are there
    table += inits(cfg, run, tokenizer, splits, new_ids, uses[::step], texts)
    if lexicon.known:
        table += calibration.judge(cfg, run, old, lexicon.known, [w for w in known if w["split"] == "test"])

    told = cards.rows(lexicon, uses, items, looks, base["definitions"], definitions)
    results.write_atomic(run.folder / "items.json", json.dumps(items))
    results.write_atomic(run.folder / "cards.md", cards.text(told, uses, items))

    def headline(metric, model, kind, source, value_of):
        row = next(r for r in table if (r["table"], r["model"], r["metric"]) == (kind, source, value_of))
        return {"table": "headline", "model": model, "metric": metric, **{k: row[k] for k in ("value", "lo", "hi", "n")}}
    heads = []
    for metric, kind, before in (("bits_per_byte, new tokens against the same training without", "minus control: uses", "control c2"),
                                 ("bits_per_byte, after against before", "minus base: uses", "base")):
        source = items[before]["uses"]
        heads += [{"table": "headline", "model": "base", "metric": metric, **stats.ratio_interval(*task.column(source, "bits_per_byte"))},
                  headline(metric, "tuned", "uses", "new c2", "bits_per_byte"),
                  next(r for r in table if (r["table"], r["model"], r["metric"]) == (kind, "new c2", "bits_per_byte"))
                  | {"table": "headline", "model": "delta", "metric": metric}]
    run.save(heads + table + told, artifacts=["items.json", "cards.md"])
    head = heads[2]
    run.log(minus_control=head["value"], lo=head["lo"], hi=head["hi"], p=head["p"], n=head["n"], verdict=head["verdict"].replace(" ", "_"))


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
