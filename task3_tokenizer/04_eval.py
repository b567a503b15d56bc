"""Question: what do the new tokens know after each stage, what did they cost, and is any of them worth having?

Every checkpoint is opened from disk as any user would open it. The comparison that counts is with the control, which saw the same texts in
the same stages spelled as before; against the untrained base alone, all training would look like a success of the new tokens.

Reads   items_base.json of 02, {new,control}/ and known/ of 03
Writes  results/<run>/task3_tokenizer/04_eval.json, runs/<run>/task3_tokenizer/{items.json,cards.md}
Needs   about 7 min and 9 GB on 2 cores
"""

import gc
import json
import math
import time
from dataclasses import dataclass

from common import models  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

import safetensors.torch
from transformers import AutoTokenizer

from common import results, stats
from task3_tokenizer import embeddings, intrinsic, task, vocabulary


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


def bits(items, key="term_nats"):
    return [i[key] / math.log(2) for i in items]


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
    """Bytes per second of reading the same windows with new tokens and as spelled before, in turns, three times after a warm-up."""
    size, spent = sum(len(row["text"].encode()) for row in uses), {"new tokens": 0.0, "old pieces": 0.0}
    for turn in range(4):
        for name, spelling in (("new tokens", tokenizer), ("old pieces", old)):
            started = time.time()
            task.score(model, spelling, uses, cfg.eval_batch_size)
            spent[name] += (time.time() - started) * (turn > 0)
    return [{"table": "speed", "model": name, "metric": "bytes_per_second", "value": 3 * size / seconds} for name, seconds in spent.items()]


def inits(cfg, run, tokenizer, splits, new_ids, uses, texts):
    """Bits per byte and over-use of every way to initialise, before any training."""
    model = models.load_decoder(str(run.artifact("03_train", "new/init")), "bf16")
    matrices, table = (model.get_input_embeddings().weight, model.get_output_embeddings().weight), []
    free = [row for row in texts if row["set"] == ("free" if any(r["set"] == "free" for r in texts) else "general")]
    old = [matrix.detach().clone() for matrix in matrices]
    methods = [m for m in embeddings.INITS if not model.config.tie_word_embeddings or "piece" not in m or m == "mean of pieces"]
    for method in methods:
        rows = [embeddings.initial(matrix[:min(splits)], [splits[i] for i in sorted(splits)], method, side, cfg.seed)
                for side, matrix in zip(("input", "output"), old)]
        embeddings.write_rows(model, list(splits), rows)
        items = {"uses": task.score(model, tokenizer, uses, cfg.eval_batch_size, new_ids),
                 "free": task.score(model, tokenizer, free, cfg.eval_batch_size, new_ids)}
        for row in task.rows_of(items, method):
            if row["metric"] in ("bits_per_byte", "term_bits", "new_token_mass"):
                table.append(row | {"metric": f"{row['table']} {row['metric']}", "table": "inits"})
    return table


def relearnt(cfg, run, tokenizer, known, windows):
    """Known-word calibration: rows hidden and learnt again against the true ones, from inside and by the probability of the word."""
    kept = safetensors.torch.load_file(run.artifact("03_train", "known") / "rows.safetensors")
    ids, table = kept["ids"].tolist(), []
    model = models.load_decoder(str(run.artifact("03_train", "control/init")), "bf16")
    words = intrinsic.whole_words(tokenizer)
    for side, matrix in (("input", model.get_input_embeddings().weight), ("output", model.get_output_embeddings().weight)):
        for which in ("start", "learnt"):
            found = intrinsic.against_truth(matrix, ids, kept[f"{side}_{which}"], words)
            table += [{"table": "known", "model": f"{side} {which}", "metric": m, "value": sum(f[m] for f in found) / len(found), "n": len(found),
                       "per_word": [f[m] for f in found]} for m in ("cosine", "rank", "overlap")]
            norms = [kept[f"{side}_{w}"].norm(dim=1).mean().item() for w in (which, "true")]
            table.append({"table": "known", "model": f"{side} {which}", "metric": "norm_over_true", "value": norms[0] / norms[1], "n": len(found)})
    scored = {}
    for which in ("true", "start", "learnt"):
        embeddings.write_rows(model, ids, [kept[f"input_{which}"], kept[f"output_{which}"]])
        scored[which] = task.score(model, tokenizer, windows, cfg.eval_batch_size)
        table += [row | {"table": "known uses"} for row in task.rows_of({"uses": scored[which]}, which) if row["metric"] != "tokens_per_byte"]
    for metric in ("bits_per_byte", "term_bits", "after_bits_per_byte", "reciprocal_rank"):
        table.append(task.delta_row("known uses", "learnt minus true", metric, scored["true"], scored["learnt"]))
    table += [{"table": "known words", "model": k["term"], "metric": "pieces", "value": len(k["pieces"])} for k in known]
    return table


def main(run):
    cfg = run.cfg
    for step in ("01_data", "02_baseline", "03_train"):
        run.load(step)
    chosen = json.loads(run.artifact("01_data", "terms.json").read_text(encoding="utf-8"))
    uses, texts, known = (task.read_rows(run.artifact("01_data", f"{name}.jsonl")) for name in ("uses", "texts", "known"))
    base = json.loads(run.artifact("02_baseline", "items_base.json").read_text(encoding="utf-8"))
    old = models.load_tokenizer(cfg.model)
    _, added = vocabulary.extend(old, [row["term"] for row in chosen["terms"]])
    splits = embeddings.spell(added, old.get_vocab())
    ids_of_terms, words = {what["term"]: what["id"] for what in added.values() if what["term"]}, intrinsic.whole_words(old)
    items, table, looks, definitions = {"base": base["measured"]}, [], {}, {}

    for arm in ("new", "control"):
        for stage in ("init", *task.STAGES) if arm == "new" else task.STAGES:  # the control before training is the base
            name, folder = f"{arm} {stage}", run.artifact("03_train", f"{arm}/{stage}")
            tokenizer, model = AutoTokenizer.from_pretrained(folder, padding_side="left"), models.load_decoder(str(folder), "bf16")
            new_ids = list(splits) if arm == "new" else []
            items[name] = task.measure(model, tokenizer, run, new_ids, old if arm == "new" else None)
            table += task.rows_of(items[name], name, stage=stage)
            if arm == "new":
                looks[stage] = intrinsic.look(model, tokenizer, chosen["terms"], ids_of_terms, words, cfg.seed)
                share = [math.exp(-o["term_nats"]) / (math.exp(-n["term_nats"]) + math.exp(-o["term_nats"]))
                         for n, o in zip(items[name]["uses"], items[name]["uses, old pieces"])]
                table.append({"table": "leak", "model": name, "stage": stage, "metric": "share_of_probability_on_old_pieces",
                              **stats.ratio_interval(share, [1] * len(share))})
            if stage in ("init", "c2"):
                found = continued(model, tokenizer, uses, ids_of_terms if arm == "new" else {}, cfg.n_continued)
                table += [{"table": "continued", "model": name, "metric": k, "value": v} for k, v in found.items()]
            if stage == "c2":
                definitions[arm] = task.define(model, tokenizer, list(ids_of_terms), cfg)
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
    if chosen["known"]:
        table += relearnt(cfg, run, old, chosen["known"], [w for w in known if w["split"] == "test"])

    cards = []
    for term in chosen["terms"]:
        word = term["term"]
        mine = [k for k, row in enumerate(uses) if row["term"] == word]
        nats = {name: [bits(items[name]["uses"])[k] for k in mine] for name in ("base", "control c2", "new init", "new a", "new c2")}
        either = [-math.log2(2 ** -new + 2 ** -spelled) for new, spelled in
                  zip(nats["new c2"], [bits(items["new c2"]["uses, old pieces"])[k] for k in mine])]
        delta = stats.paired_delta(nats["control c2"], either)
        judged = stats.verdict(delta, higher_is_better=False)
        near = {side: next(f for f in looks["c2"] if (f["side"], f["term"]) == (side, word)) for side in ("input", "output")}
        start = {side: next(f for f in looks["init"] if (f["side"], f["term"]) == (side, word)) for side in ("input", "output")}
        cards.append({"table": "cards", "model": word, "metric": "term_bits_minus_control", **delta, "verdict": judged,
                      **{name.replace(" ", "_"): sum(v) / len(v) for name, v in nats.items()}, "either": sum(either) / len(either),
                      "median_rank": sorted(items["new c2"]["uses"][k]["rank"] for k in mine)[len(mine) // 2], "new_id": ids_of_terms[word],
                      "anchors_before": start["input"]["anchors"], "anchors_after": near["input"]["anchors"],
                      "anchors_after_output": near["output"]["anchors"], "anchor_rank_before": start["output"]["anchor_rank"],
                      "anchor_rank_after": near["output"]["anchor_rank"],
                      "neighbours_before": start["output"]["neighbours"], "neighbours_after": near["output"]["neighbours"],
                      "neighbours_input_before": start["input"]["neighbours"], "neighbours_input_after": near["input"]["neighbours"],
                      "definition_before": base["definitions"][word], "definition_control": definitions["control"][word],
                      "definition_after": definitions["new"][word]})
    results.write_atomic(run.folder / "items.json", json.dumps(items))
    write_cards(run, cards, uses, items)

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
    run.save(heads + table + cards, artifacts=["items.json", "cards.md"])
    head = heads[2]
    run.log(minus_control=head["value"], lo=head["lo"], hi=head["hi"], p=head["p"], n=head["n"], verdict=head["verdict"].replace(" ", "_"))


def write_cards(run, cards, uses, items):
    """A card per term with its best and worst held-out sentence: for the reader's own machine only, it quotes the installed packages."""
    text = ["# A card per term\n"]
    for card in cards:
        mine = sorted((k for k, row in enumerate(uses) if row["term"] == card["model"]), key=lambda k: items["new c2"]["uses"][k]["term_nats"])
        text.append(f"## {card['model']} (id {card['new_id']}): {card['verdict']}\n")
        text += [f"- {key}: {value}" for key, value in card.items() if key not in ("table", "model", "verdict")]
        text += [f"- {name}: {uses[k]['text'].strip()} ({items['new c2']['uses'][k]['term_nats'] / math.log(2):.1f} bits for the term)"
                 for name, k in (("best", mine[0]), ("worst", mine[-1]))]
    results.write_atomic(run.folder / "cards.md", "\n".join(text) + "\n")


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
