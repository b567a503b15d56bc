"""Question: what do the new tokens know after each stage, what did they cost, and is any worth having?

Every checkpoint is opened from disk as any user would open it. The fair comparison is with the control, which
saw the same texts in the same stages without new tokens: compared with the untrained base, any training looks
like a success of the new tokens.

Reads   02_baseline.json and items_base.json of 02, {new,control}/ of 03
Writes  results/<run>/task3_tokenizer/04_eval.json, runs/<run>/task3_tokenizer/items.json
Needs   about 3.5 min and 2.5 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import gc
import itertools
import json
import math
from dataclasses import dataclass

from common import models, stats
from pipeline import card
from task3_tokenizer import embeddings, task, windows


@dataclass(frozen=True)
class Config(task.Config):
    # Held-out beginnings of each term that the model continues: does it write the term, and with which
    # tokens?
    n_continued: int = 3


PROFILES = {"smoke": dict(n_continued=1), "cpu": dict(), "gpu": dict(n_continued=10)}
LAST = task.STAGES[-1]


def continuations(model, tokenizer, rows, new_ids, n):
    """Of n held-out beginnings right before each term: how often the term is written, and how often by its id
    in `new_ids` {term: id}."""
    chosen = [row for own in windows.by_term(rows) for row in own[:n]]
    counts = {"continued": len(chosen), "term_written": 0, "term_written_by_new_id": 0}
    written = task.generate(model, tokenizer, [row["text"][:row["start"] - 1] for row in chosen], 8)
    for row, ids in zip(chosen, written):
        text, term = tokenizer.decode(ids, clean_up_tokenization_spaces=False), f" {row['term']}"
        is_term = text.startswith(term) and not text[len(term):][:1].isalnum()
        counts["term_written"] += is_term
        counts["term_written_by_new_id"] += is_term and ids[0] == new_ids[row["term"]]
    return counts


def term_rows(lexicon, rows, items, old_pieces, cosines, definitions):
    """A result row for each term: bits per occurrence of each model, the new model's words with the id or the
    old pieces ("either": their probabilities added) minus the control's, the nearest words and what the
    models say it means."""
    control, new, table = f"control {LAST}", f"new {LAST}", []
    scored = {name: items[name]["term windows"] for name in ("base", control, "new init", "new a", new)}
    scored["either"] = [by_id | {"term_nats": -math.log(sum(math.exp(-i["term_nats"]) for i in (by_id, old)))}
                        for by_id, old in zip(scored[new], old_pieces)]
    for k, term in enumerate(lexicon.ids):
        own = {name: [item for item, row in zip(part, rows) if row["term"] == term]
               for name, part in scored.items()}
        bits = {name.replace(" ", "_"): sum(i["term_nats"] for i in part) / len(part) * task.BITS
                for name, part in own.items()}
        near = {f"near_{side}_{stage}": cosines[stage][side][k]["neighbours"]
                for side in ("input", "output") for stage in ("init", LAST)}
        said = {f"definition_{model}": texts[term] for model, texts in definitions.items()}
        rank = sorted(item["rank"] for item in own[new])[len(own[new]) // 2]
        table += stats.delta_rows("terms", term, own[control], own["either"], [task.TERM_BITS],
                                  median_rank=rank, **bits, **near, **said)
    return table


def main(run):
    cfg = run.cfg
    _, _, made = (run.load(step) for step in ("01_data", "02_baseline", "03_train"))
    base = json.loads(run.artifact("02_baseline", "items_base.json").read_text())
    items, definitions = {"base": base["items"]}, {"base": base["definitions"]}
    lexicon, tests = task.lexicon(run), task.test_sets(run)
    words, rows = embeddings.whole_words(lexicon.old), tests["term windows"]
    table, cosines = [], {}

    trained = [("new", "init"), *itertools.product(("new", "control"), task.STAGES)]
    for arm, stage in trained:  # the control before training is the base
        name, folder = f"{arm} {stage}", run.artifact("03_train", f"{arm}/{stage}")
        tokenizer, added = (lexicon.new, lexicon.pieces_of) if arm == "new" else (lexicon.old, ())
        model = models.load_decoder(str(folder), models.compute_name(cfg.compute))
        items[name] = task.measure(cfg, model, tokenizer, tests, added)
        for kind, part in items[name].items():
            table += task.rows_of(kind, name, part, stage=stage)
        if arm == "new":
            cosines[stage] = embeddings.cosines(model, tokenizer, lexicon.terms, lexicon.ids, words)
        if stage in ("init", LAST):
            counts = continuations(model, tokenizer, rows, lexicon.ids, cfg.n_continued)
            table += stats.facts("continued", name, counts)
        if stage == LAST:
            definitions[arm] = task.define(model, tokenizer, list(lexicon.ids), cfg)
        if name == f"new {LAST}":  # the same windows, the term in question, and only it, as its old tokens
            old_pieces = task.score(model, tokenizer, rows, cfg.eval_batch_size, term_tokenizer=lexicon.old)
            table += task.delta_rows("id minus old pieces", name, old_pieces, items[name]["term windows"])
        run.log(scored=name.replace(" ", "_"))
        del model
        gc.collect()

    for arm, start in (("new", "new init"), ("control", "base")):
        stats.refuse_unchanged(items[start], items[f"{arm} {LAST}"])
    for stage in task.STAGES:
        for kind, new in items[f"new {stage}"].items():
            for other, before in (("control", items[f"control {stage}"]), ("base", items["base"])):
                table += task.delta_rows(f"minus {other}: {kind}", f"new {stage}", before[kind], new)
    for kind in tests:
        before, after = (sum(i["tokens"] for i in items[name][kind]) for name in ("base", f"new {LAST}"))
        table += stats.facts("saved", kind, {"share_of_tokens": 1 - after / before})
    for stage, sides in cosines.items():
        for side, own in sides.items():
            table += task.rows_of("cosines", side, own, stage=stage)
            if stage != "init":
                table += task.delta_rows("cosines minus init", side, cosines["init"][side], own, stage=stage)
    n_terms = len(lexicon.ids)  # what identification_bits are beside: a guess among so many
    table += stats.facts("guess", "among the terms", {"identification_bits": math.log2(n_terms)},
                         label="bits of a guess", terms=n_terms)
    table += term_rows(lexicon, rows, items, old_pieces, cosines, definitions)

    results.write_atomic(run.folder / "items.json", json.dumps(items))
    stats.holm(table)
    card.write(run, made, table, f"new/{LAST}")
    run.save(table, artifacts=["items.json"])
    key = ("minus control: term windows", f"new {LAST}")
    delta = next(row for row in table if (row["table"], row["name"]) == key)
    run.log(minus_control=delta["value"], **{key: delta[key] for key in ("lo", "hi", "p", "n", "verdict")})


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
