"""Question: which of the choices about new rows mattered, and how many texts does a token need?

Every row is stage (a), the rows alone, with one thing changed, scored once on the uses of 04: later stages move everything and would hide
it. Only further seeds go through all of them. Not numbered, because nothing depends on it; `make ablations` runs it. Interrupted, the same
command goes on with the row it was at.

Reads   the knobs and data of 01-04 of the same run
Writes  results/<run>/task3_tokenizer/ablations.json, runs/<run>/task3_tokenizer/ablations/
Needs   about 2 min a row, 28 min in all, 11 GB and 2 GB of disk on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # a wrong one is said before the seconds that the next imports take

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

from common import models, stats
from task3_tokenizer import embeddings, intrinsic, task, training, vocabulary


@dataclass(frozen=True)
class Config(task.Config):
    # Names of the rows to train, separated by ";" ("" = all): for one more look at one of them.
    only: str = ""
    # Terms of the curve over texts per token, those with the most texts: few have 200.
    n_curve: int = 6
    # Further seeds through all stages, both arms: what another order of texts and another adapter change, which no interval over texts shows.
    # 10 minutes each on 2 cores.
    seeds: int = 1


PROFILES = {
    "smoke": dict(
        only="tied;AddedToken;texts per token",  # what takes another path through the code
        n_curve=2,  # same
    ),
    "cpu": dict(),
    "gpu": dict(
        seeds=2,  # minutes become seconds
    ),
}
MIXED = "text without terms mixed in"  # as five more terms would be: does the model stop expecting a term everywhere?
# name -> (way of adding the tokens, knobs of 03 changed); what 03 itself trained is the row they are compared with
ROWS = {
    **{init: ("entry and merges", {"init": init}) for init in embeddings.INITS if init != "mean of pieces"},
    "tied": ("entry and merges", {"tied": True}),
    "AddedToken": ("AddedToken", {}),
    MIXED: ("entry and merges", {}),
}
SEED = "all stages,"  # + "seed 1" and so on: that many more than the seed of 03
TEXTS = {"smoke": (0, 2)}
CURVE_ROW = "texts per token"
CURVE = (0, 5, 25, 50, 100, 200)  # 0: the mean of the pieces, untrained


def silent(**values):
    """No line per step: there would be hundreds."""


def kept(run, name: str, given: list, make, *arguments) -> dict:
    """What `make(folder, *arguments)` returned, stored as results.cached says; the folder it trains in is removed."""
    folder = run.folder / "ablations" / re.sub(r"\W+", "-", name)
    found = results.cached(folder.with_suffix(".json"), given, partial(make, folder, *arguments))
    shutil.rmtree(folder, ignore_errors=True)
    return found


def one_row(folder, cfg, way, lexicon, rows, dev, scored):
    """{"items"}: stage (a) on the windows `rows` with the knobs `cfg` and the tokens added in one of vocabulary.variants' ways, then read on
    the texts `scored` {kind: rows}."""
    tokenizer, splits, words = lexicon.new, lexicon.splits, list(lexicon.ids)
    if way != "entry and merges":
        # a plain AddedToken leaves the blank outside, and a word that is an entry without blank keeps that entry's id and row
        tokenizer = vocabulary.variants(lexicon.old, words, lexicon.new)[way]
        splits = {task.ids_of(tokenizer, word)[-1]: task.ids_of(lexicon.old, word) for word in words}
    training.begin(cfg, folder / "init", tokenizer, splits, dev, "")
    batch = min(cfg.batch_size, len(words))
    shown = training.in_turn(rows, cfg.seed, batch)
    training.train_stage(cfg, folder / "init", folder / "a", tokenizer, sorted(splits), False, [], training.rates(cfg, "a", batch), shown, batch,
                         dev, "", silent)
    model = models.load_decoder(str(folder / "a"), models.compute_name(cfg.compute))
    return {"items": {kind: task.score(model, tokenizer, part, cfg.eval_batch_size, list(splits)) for kind, part in scored.items()}}


def again(folder, cfg, mark, tokenizer, splits, ids, rows, dev, run):
    """{"items"} of 04 for one arm trained through all stages; interrupted, it goes on with the stage it was in."""
    for stage, _ in training.stages(cfg, folder, tokenizer, splits, ids, rows, dev, mark, silent):
        last = folder / stage
    model = models.load_decoder(str(last), models.compute_name(cfg.compute))
    return {"items": task.measure(model, tokenizer, run, list(splits))}


def one_point(folder, cfg, texts, source, lexicon, words, rows, dev, uses):
    """{"items", "steps", "windows", "looks"} of stage (a) with so many texts for each of `words`, from the checkpoint `source`."""
    ids, batch, facts = {word: lexicon.ids[word] for word in words}, min(cfg.batch_size, len(words)), {"steps": 0, "texts": 0}
    if texts:  # at the rate of (a): a row has as many windows in a step as there
        facts = training.train_stage(cfg, source, folder, lexicon.new, sorted(ids.values()), False, [], (cfg.lr_rows,),
                                     training.in_turn(rows, cfg.seed, batch, texts), batch, dev, "", silent)
    model = models.load_decoder(str(folder if texts else source), models.compute_name(cfg.compute))
    terms = [row for row in lexicon.chosen if row["term"] in words]
    looks = intrinsic.look(model, lexicon.new, terms, ids, intrinsic.whole_words(lexicon.old), cfg.seed)
    return {"items": task.score(model, lexicon.new, uses, cfg.eval_batch_size, list(ids.values())), "steps": facts["steps"],
            "windows": facts["texts"], "looks": [f["anchors"] for f in looks if f["side"] == "output"]}


def curve(run, config, data, lexicon, words, rows, dev, uses):
    """Result rows of stage (a) with 0 to 200 texts for each of `words`."""
    rows, uses = ([row for row in part if row["term"] in words] for part in (rows, uses))
    source, table = run.artifact("03_train", "new/init"), []
    for texts in TEXTS.get(run.profile, CURVE):
        found = kept(run, f"texts {texts}", [config, results.result_hash(data), words], one_point, SimpleNamespace(**config), texts, source,
                     lexicon, words, rows, dev, uses)
        more = {"texts": texts, "steps": found["steps"], "terms": len(words), "windows_per_term": found["windows"] / len(words)}
        table += [row | more | {"table": "texts"} for row in task.rows_of({"uses": found["items"]}, "new a")]
        if len(looks := [c for c in found["looks"] if c is not None]) > 1:
            table.append({"table": "texts", "model": "new a", "metric": "anchors", **stats.ratio_interval(looks, [1] * len(looks)), **more})
        run.log(texts=texts, steps=found["steps"], term_bits=next(r["value"] for r in table if r["texts"] == texts and r["metric"] == "term_bits"))
    return table


def seed_rows(run, config, data, lexicon, names, measured, rows, dev):
    """Result rows of both arms after all stages, as 03 trained them and with each of the seeds `names`."""
    trained, table = {"as in 03": {arm: measured[f"{arm} c2"] for arm in ("new", "control")}}, []
    for name in names:
        number, trained[name] = int(name.split()[-1]), {}
        knobs = config | {"seed": config["seed"] + number}
        for arm, tokenizer, splits, ids in (("new", lexicon.new, lexicon.splits, sorted(lexicon.splits)),
                                            ("control", lexicon.old, {}, lexicon.pieces)):
            mark = partial(training.identity, knobs, data, arm)
            trained[name][arm] = kept(run, f"seed {number} {arm}", [knobs, results.result_hash(data)], again, SimpleNamespace(**knobs), mark,
                                      tokenizer, splits, ids, rows, dev, run)["items"]
            run.log(row=f"{arm}_c2_seed_{number}", bits_per_byte=task.rows_of({"uses": trained[name][arm]["uses"]}, arm)[0]["value"])
    for kind in measured["control c2"]:
        for name, arms in trained.items():
            more = {"seed": name.removeprefix(SEED).strip() if name != "as in 03" else name, "kind": kind}
            table += [row | {"table": "seeds"} | more for arm, items in arms.items() for row in task.rows_of({kind: items[kind]}, arm)
                      if row["metric"] == "bits_per_byte"]
            table.append(task.delta_row("seeds", "new minus control", "bits_per_byte", arms["control"][kind], arms["new"][kind]) | more)
    return table


def main(run):
    cfg, data, trained = run.cfg, run.load("01_data"), run.load("03_train")
    run.load("04_eval")
    config, seeds = trained["config"], [f"{SEED} seed {k}" for k in range(1, cfg.seeds + 1)]
    names = results.chosen(cfg.only, [*ROWS, CURVE_ROW, *seeds])
    was_tied = next(r["value"] for r in run.load("02_baseline")["rows"] if r["metric"] == "tied")
    impossible = {"tied"} if config["tied"] or not was_tied else set()
    impossible |= {"last and first piece", "weighted pieces"} if config["tied"] else set()
    terms, extended = run.artifact("01_data", "terms.json"), run.artifact("01_data", "tokenizer")
    lexicon = task.lexicon(cfg.model, terms, extended)
    rows, plain, dev, uses, texts = (results.read_rows(run.artifact("01_data", f"{name}.jsonl"))
                                     for name in ("train", "plain", "dev", "uses", "texts"))
    measured = json.loads(run.artifact("04_eval", "items.json").read_text())
    free = "free" if "free" in measured["new a"] else "general"
    scored = {"uses": uses, "free": [row for row in texts if row["set"] == free]}
    done = {"as in 03": {"uses": measured["new a"]["uses"], "free": measured["new a"][free]}}
    for name in (n for n in names if n in ROWS and n not in impossible):
        way, changed = ROWS[name]
        knobs = SimpleNamespace(**config | changed)
        shown = training.deal(knobs, rows)["a"] + [row | {"term": f"none {k % 5}"} for k, row in enumerate(plain) if name == MIXED]
        done[name] = kept(run, name, [vars(knobs), results.result_hash(data)], one_row, knobs, way, lexicon, shown, dev, scored)["items"]
        spent = sum(i["nats"] for i in done[name]["uses"]) / sum(i["bytes"] for i in done[name]["uses"])
        run.log(row=name.replace(" ", "_"), nats_per_byte=spent)
    table = []
    for name, items in done.items():
        table += [row | {"table": "ablation"} for row in task.rows_of({"uses": items["uses"]}, name)]
        table += [row | {"table": "ablation"} for row in task.rows_of({"free": items["free"]}, name) if row["metric"] == "new_token_mass"]
        if name != "as in 03":
            table.append(task.delta_row("ablation minus 03", name, "bits_per_byte", done["as in 03"]["uses"], items["uses"]))
    if CURVE_ROW in names:
        words = [word for word, _ in Counter(row["term"] for row in rows).most_common(cfg.n_curve)]
        table += curve(run, config, data, lexicon, words, rows, dev, uses)
        base = [item for item, row in zip(measured["base"]["uses"], uses) if row["term"] in words]
        table += [row | {"table": "texts base"} for row in task.rows_of({"uses": base}, "base")]
    if further := [n for n in names if n in seeds]:
        table += seed_rows(run, config, data, lexicon, further, measured, rows, dev)
    run.save(table)


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
