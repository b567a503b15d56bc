"""Question: which of the choices about new rows mattered, and how many texts does a token need?

Every row is stage (a), the rows alone, with one thing changed, scored on the test texts of 04: later stages move
everything and would hide the difference. Only further seeds go through all stages. `make ablations` runs it, and nothing
depends on it. Interrupted, the same command goes on with the row it was at.

Reads   the knobs and data of 01-04 of the same run
Writes  results/<run>/task3_tokenizer/ablations.json, runs/<run>/task3_tokenizer/ablations/
Needs   about 2 min a row, 28 min in all, 11 GB and 2 GB of disk on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # before the seconds that the next imports take

import importlib
import itertools
import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial

from common import models
from task3_tokenizer import embeddings, task, vocabulary, windows

training = importlib.import_module("task3_tokenizer.03_train")


@dataclass(frozen=True)
class Config(task.Config):
    # Names of the rows to train, separated by ";" ("" = all): to add or repeat some of them.
    only: str = ""
    # Terms of the curve over texts per token, those with the most texts: few have 200.
    n_curve: int = 6
    # Further seeds through all stages, both arms: another order of texts and another adapter change the result, which no
    # interval over texts shows. 10 minutes each on 2 cores.
    seeds: int = 1


PROFILES = {
    "smoke": dict(
        # What takes another path through the code.
        only="tied;AddedToken;texts per token",
        n_curve=2,
    ),
    "cpu": dict(),
    "gpu": dict(seeds=2),
}
# name -> (way of adding the tokens, knobs of 03 changed)
ROWS = {
    **{init: ("entry and merges", {"init": init}) for init in embeddings.INITS if init != "mean of pieces"},
    "tied": ("entry and merges", {"tied": True}),
    "AddedToken": ("AddedToken", {}),
}
CURVE = "texts per token"
TEXTS = {"smoke": (0, 2), "cpu": (0, 5, 25, 50, 100, 200), "gpu": (0, 5, 25, 50, 100, 200)}  # 0: untrained


def silent(**values):
    """No line for each step: there would be hundreds."""


def stored(run, name: str, given: list, make, *arguments) -> dict:
    """What `make(folder, *arguments)` returned, stored as results.cached says; the folder it trains in is removed."""
    folder = run.folder / "ablations" / re.sub(r"\W+", "-", name)
    values = results.cached(folder.with_suffix(".json"), [name, *given], partial(make, folder, *arguments))
    shutil.rmtree(folder, ignore_errors=True)
    return values


def stage_a(folder, cfg, way, lexicon, rows, dev, tests):
    """{kind: items} of `tests` {kind: rows} after stage (a), with the tokens added in one of vocabulary.ways."""
    arm, _ = training.arms(lexicon)
    if way != "entry and merges":
        # A plain AddedToken leaves the space outside, and a word that is an entry without space keeps its id and row.
        tokenizer = vocabulary.ways(lexicon.old, list(lexicon.ids), lexicon.new)[way]
        pieces_of = {task.ids_of(tokenizer, word)[-1]: task.ids_of(lexicon.old, word) for word in lexicon.ids}
        arm = training.Arm("new", tokenizer, pieces_of, sorted(pieces_of))
    for _ in itertools.islice(training.train(cfg, arm, folder, rows, dev, "", silent), 2):
        pass  # init and a
    model = models.load_decoder(str(folder / "a"), models.compute_name(cfg.compute))
    return {kind: task.score(model, arm.tokenizer, part, cfg.eval_batch_size, arm.ids) for kind, part in tests.items()}


def all_stages(folder, cfg, arm, rows, dev, made_from, run):
    """{kind: items} of all test texts after the last stage."""
    for stage, _ in training.train(cfg, arm, folder, rows, dev, made_from, silent):
        last = folder / stage
    model = models.load_decoder(str(last), models.compute_name(cfg.compute))
    return task.measure(run, model, arm.tokenizer, list(arm.pieces_of))


def curve_point(folder, cfg, texts, source, lexicon, words, rows, dev, tests):
    """{"items", "steps", "windows", "cosines"} of stage (a) with so many texts of each of `words`, from `source`."""
    ids, batch_size, stats = {word: lexicon.ids[word] for word in words}, min(cfg.batch_size, len(words)), {}
    if texts:  # the rate is that of a full batch: a row has as many windows in a step as there
        arm, stage = training.Arm("new", lexicon.new, {}, sorted(ids.values())), training.Stage(texts, cfg.lr_rows)
        ordered = windows.interleave_terms(rows, cfg.seed, batch_size, texts)
        stats = training.train_stage(cfg, arm, stage, source, folder, ordered, batch_size, dev, silent)
    model = models.load_decoder(str(folder if texts else source), models.compute_name(cfg.compute))
    terms = [row for row in lexicon.terms if row["term"] in words]
    return {"items": task.score(model, lexicon.new, tests, cfg.eval_batch_size, list(ids.values())),
            "steps": stats.get("steps", 0), "windows": stats.get("texts", 0),
            "cosines": embeddings.cosines(model, lexicon.new, terms, ids, embeddings.whole_words(lexicon.old))["output"]}


def main(run):
    cfg, data, trained = run.cfg, results.result_hash(run.load("01_data")), run.load("03_train")
    run.load("04_eval")
    of_03 = partial(results.config_of, training.Config, trained["config"])
    base_cfg, lexicon, tests = of_03(), task.lexicon(run), task.test_sets(run)
    rows, dev = (results.read_rows(run.artifact("01_data", f"{name}.jsonl")) for name in ("train", "dev"))
    items = json.loads(run.artifact("04_eval", "items.json").read_text())
    seeds = {f"all stages, seed {k}": k for k in range(1, cfg.seeds + 1)}
    names, table = results.chosen(cfg.only, [*ROWS, CURVE, *seeds]), []
    was_tied = next(r["value"] for r in run.load("02_baseline")["rows"] if r["metric"] == "tied")
    impossible = ["tied"] if base_cfg.tied or not was_tied else []
    impossible += embeddings.TWO_ROWS if base_cfg.tied else []

    # Stage (a) with one thing changed.
    kinds = ("term windows", "without terms" if "without terms" in tests else "general English")
    done = {"as in 03": items["new a"]}
    for name in (name for name in names if name in ROWS and name not in impossible):
        way, changes = ROWS[name]
        own = of_03(**changes)
        done[name] = stored(run, name, [vars(own), data], stage_a, own, way, lexicon, rows, dev,
                            {kind: tests[kind] for kind in kinds})
        table += task.delta_rows("ablation minus 03", name, items["new a"][kinds[0]], done[name][kinds[0]])
        run.log(row=name.replace(" ", "_"), minus_03=table[-1]["value"])
    table += [row for name, by_kind in done.items() for kind in kinds
              for row in task.rows_of("ablation", name, by_kind[kind], kind=kind)]

    # Stage (a) with 0 to 200 texts for each of the terms that have most.
    if CURVE in names:
        words = [word for word, _ in Counter(row["term"] for row in rows).most_common(cfg.n_curve)]
        mine = [k for k, row in enumerate(tests["term windows"]) if row["term"] in words]
        shown = [tests["term windows"][k] for k in mine]
        table += task.rows_of("curve base", "base", [items["base"]["term windows"][k] for k in mine])
        for texts in TEXTS[run.profile]:
            point = stored(run, f"texts {texts}", [vars(base_cfg), data, words], curve_point, base_cfg, texts,
                           run.artifact("03_train", "new/init"), lexicon, words, [r for r in rows if r["term"] in words],
                           dev, shown)
            more = {"texts": texts, "steps": point["steps"], "terms": len(words),
                    "windows_per_term": point["windows"] / len(words)}
            table += task.rows_of("curve", "new a", point["items"], **more)
            table += task.rows_of("curve", "new a", point["cosines"], **more)
            run.log(texts=texts, steps=point["steps"])

    # All stages of both arms with other seeds.
    trainings = {"as in 03": {arm: items[f"{arm} {task.STAGES[-1]}"] for arm in ("new", "control")}}
    for name in (name for name in names if name in seeds):
        own = of_03(seed=base_cfg.seed + seeds[name])
        trainings[name] = {arm.name: stored(run, f"{name} {arm.name}", [vars(own), data], all_stages, own, arm, rows, dev,
                                            data, run) for arm in training.arms(lexicon)}
        run.log(row=name.replace(" ", "_"))
    for kind, (name, by_arm) in itertools.product(tests, trainings.items() if len(trainings) > 1 else ()):
        more = {"seed": name, "kind": kind}
        for arm in ("new", "control"):
            table += task.rows_of("seeds", arm, by_arm[arm][kind], **more)
        table += task.delta_rows("seeds", "new minus control", by_arm["control"][kind], by_arm["new"][kind], **more)
    run.save(table)


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
