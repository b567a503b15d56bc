"""Question: which of the choices about new rows mattered, and how many texts does a token need?

Every row is stage (a), the rows alone, with one thing changed, scored on the test texts of 04: later stages
move everything and would hide the difference. Only further seeds go through all stages. `make ablations` runs
it, and nothing depends on it. Interrupted, the same command goes on with the row it was at.

Reads   the knobs and data of 01-04 of the same run
Writes  results/<run>/task3_tokenizer/ablations.json, runs/<run>/task3_tokenizer/ablations/
Needs   about 2.5 min a row, 9 min a further seed, 45 min in all, 5.5 GB and 2 GB of disk on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import knobs, results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import importlib
import itertools
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial

from common import models, stats
from task3_tokenizer import embeddings, task, vocabulary

training = importlib.import_module("task3_tokenizer.03_train")


@dataclass(frozen=True)
class Config(task.Config):
    # Names of the rows to train, separated by ";" ("" = all): to add or repeat some of them.
    only: str = ""
    # Texts per term of the curve; 0 is the untrained mean of the pieces.
    curve: str = "0 5 25 50 100 200"
    # Terms of the curve over texts per token, those with the most texts: few have 200.
    n_curve: int = 6
    # Further seeds through all stages, both arms: another order of texts and another adapter change the
    # result, which no interval over texts shows. 10 minutes each on 2 cores.
    seeds: int = 2


PROFILES = {
    "smoke": dict(
        # What takes another path through the code.
        only="tied;AddedToken;texts per token",
        curve="0 2",
        n_curve=2,
    ),
    "cpu": dict(),
    "gpu": dict(),
}
# name -> knobs of 03 changed
ROWS = {
    **{init: {"init": init} for init in embeddings.INITS if init != "mean of pieces"},
    "tied": {"tied": True},
    "AddedToken": {},
}
CURVE = "texts per token"


def trained(folder, cfg, arm, n_stages, texts, dev, data, tests, terms):
    """{kind: items} of `tests` {kind: rows}, scored after the first stages of `arm`, the stats of the last of
    them, and the "cosines" of the output rows of `terms`, which have one id in the arm's tokenizer."""
    stages = training.train(cfg, arm, folder, texts, dev, data, lambda **values: None)  # no line a step
    *_, (last, stats) = itertools.islice(stages, 1 + n_stages)
    model = models.load_decoder(str(folder / last), models.compute_name(cfg.compute))
    items = task.measure(cfg, model, arm.tokenizer, tests, arm.pieces_of)
    ids = {row["term"]: task.ids_of(arm.tokenizer, f" {row['term']}")[0] for row in terms}
    cosines = embeddings.cosines(model, arm.tokenizer, terms, ids, {})["output"]
    return {**items, "stats": stats, "cosines": cosines}


def added_tokens(lexicon):
    """The arm with new tokens, added as AddedToken instead of entries with merges."""
    tokenizer = vocabulary.ways(lexicon.old, list(lexicon.ids), lexicon.new)["AddedToken"]
    # The space stays outside, and a word that is an entry without space keeps its id and row.
    pieces_of = {task.ids_of(tokenizer, word)[-1]: task.ids_of(lexicon.old, word) for word in lexicon.ids}
    return training.Arm("new", tokenizer, pieces_of, sorted(pieces_of))


def main(run):
    cfg, data = run.cfg, results.result_hash(run.load("01_data"))
    run.load("04_eval")
    config, lexicon, tests = run.load("03_train")["config"], task.lexicon(run), task.test_sets(run)
    texts, dev = map(run.rows, ("train", "dev"))
    items = json.loads(run.artifact("04_eval", "items.json").read_text())
    seeds = {f"all stages, seed {k}": k for k in range(1, cfg.seeds + 1)}
    names, table = knobs.chosen(cfg.only, [*ROWS, CURVE, *seeds]), []
    was_tied = next(r["value"] for r in run.load("02_baseline")["rows"] if r["metric"] == "tied")
    if config["tied"] or not was_tied:
        names = [name for name in names if name != "tied"]

    def train_row(name, changes, arm, n_stages, texts, tests, terms=()):
        """As `trained`, with knobs of 03 changed; stored, and the checkpoints are removed."""
        own = knobs.config_of(training.Config, config, **changes)
        folder = run.folder / "ablations" / name.replace(" ", "-")
        train = partial(trained, folder, own, arm, n_stages, texts, dev, data, tests, terms)
        given = [name, vars(own), data, [row["term"] for row in terms]]
        values = results.cached(folder.with_suffix(".json"), given, train)
        shutil.rmtree(folder, ignore_errors=True)
        return values

    # Stage (a) with one thing changed.
    new, control = training.arms(lexicon)
    kinds = ("term windows", "without terms" if "without terms" in tests else "general English")
    done = {"as in 03": items["new a"]}
    for name in (name for name in names if name in ROWS):
        arm = added_tokens(lexicon) if name == "AddedToken" else new
        done[name] = train_row(name, ROWS[name], arm, 1, texts, {kind: tests[kind] for kind in kinds})
        table += task.delta_rows("ablation minus 03", name, items["new a"][kinds[0]], done[name][kinds[0]])
        run.log(row=name.replace(" ", "_"), minus_03=table[-1]["value"])
    for name, kind in itertools.product(done, kinds):
        table += task.rows_of("ablation", name, done[name][kind], kind=kind)

    # Stage (a) with 0 to 200 texts for each of the terms that have most.
    if CURVE in names:
        words = [word for word, _ in Counter(row["term"] for row in texts).most_common(cfg.n_curve)]
        arm = new._replace(ids=sorted(lexicon.ids[word] for word in words))
        uses = tests["term windows"]
        base = [item for item, row in zip(items["base"]["term windows"], uses) if row["term"] in words]
        table += task.rows_of("curve base", "base", base)
        own_texts, own_uses, terms = ([row for row in part if row["term"] in words]
                                      for part in (texts, uses, lexicon.terms))
        # Fewer terms in a batch, yet the full rate: a row has as many windows in a step as with all terms.
        few = dict(batch_size=min(config["batch_size"], len(words)), texts_b=1, texts_c1=1, texts_c2=1)
        for n in map(int, cfg.curve.split()):
            point = train_row(f"texts {n}", {"texts_a": max(1, n), **few}, arm, int(n > 0), own_texts,
                              {"term windows": own_uses}, terms)
            more = {"texts": n, "terms": len(words),
                    "windows_per_term": point["stats"].get("texts", 0) / len(words)}
            table += task.rows_of("curve", "new a", point["term windows"], **more)
            table += task.rows_of("curve", "new a", point["cosines"], **more)

    # All stages of both arms with other seeds.
    pairs = {config["seed"]: [items[f"{arm.name} {task.STAGES[-1]}"] for arm in (new, control)]}
    for seed in (config["seed"] + seeds[name] for name in names if name in seeds):
        pairs[seed] = [train_row(f"seed {seed} {arm.name}", {"seed": seed}, arm, len(task.STAGES), texts,
                                 tests) for arm in (new, control)]
    pairs = pairs if len(pairs) > 1 else {}
    for kind, (seed, (with_new, without)) in itertools.product(tests, pairs.items()):
        more = {"seed": seed, "kind": kind}
        table += task.rows_of("seeds", "new", with_new[kind], **more)
        table += task.rows_of("seeds", "control", without[kind], **more)
        table += task.delta_rows("seeds", "new minus control", without[kind], with_new[kind], **more)
    stats.holm(table)
    table += stats.over_seeds([row for row in table if row["name"] == "new minus control"])
    run.save(table)


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
