"""Question: which of the choices about new rows mattered, and how many texts does a token need?

Every row is stage (a), the rows alone, with one thing changed, scored once on the uses of 04: later stages move everything and would hide
it. Not numbered, because nothing depends on it; `make ablations` runs it. Interrupted, the same command goes on with the row it was at.

Reads   the knobs and data of 01-04 of the same run
Writes  results/<run>/task3_tokenizer/ablations.json, runs/<run>/task3_tokenizer/ablations/
Needs   about 2 min a row, 30 min in all, and 11 GB on 2 cores
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

from common import models  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

from transformers import AutoTokenizer

from common import results, stats
from task3_tokenizer import embeddings, intrinsic, task, training, vocabulary


@dataclass(frozen=True)
class Config(task.Config):
    # Names of the rows to train, separated by ";" ("" = all): for one more look at one of them.
    only: str = ""
    # Terms of the curve over texts per token, those with the most texts: few have 200.
    n_curve: int = 6


PROFILES = {
    "smoke": dict(
        only="tied;AddedToken;texts per token",  # what takes another path through the code
        n_curve=2,  # same
    ),
    "cpu": dict(),
    "gpu": dict(),
}
# name -> (way of adding the tokens, knobs of 03 changed); what 03 itself trained is the row they are compared with
ROWS = {
    **{init: ("entry and merges", {"init": init}) for init in embeddings.INITS if init != "mean of pieces"},
    "tied": ("entry and merges", {"tied": True}),
    "AddedToken": ("AddedToken", {}),
}
SEED = "all stages, seed 1"  # both arms once more: what another order of texts and another adapter change, which no interval over texts shows
TEXTS = {"smoke": (0, 2)}
CURVE_ROW = "texts per token"
CURVE = (0, 5, 25, 50, 100, 200)  # 0: the mean of the pieces, untrained


def added_by(way, tokenizer, words):
    """(tokenizer, {new id: old ids}) of one of vocabulary.variants."""
    if way == "entry and merges":
        built, added = vocabulary.extend(tokenizer, words)
        return built, embeddings.spell(added, tokenizer.get_vocab())
    # a plain AddedToken leaves the blank outside, and a word that is an entry without blank keeps that entry's id and row
    built = vocabulary.variants(tokenizer, words)[way]
    return built, {task.ids_of(built, word)[-1]: task.ids_of(tokenizer, word) for word in words}


def train_row(run, name, config, data_hash, source, words, rows, dev, uses, free):
    """{"items"} of one row, from its cache if neither knobs, data nor code changed."""
    way, _ = ROWS[name]
    folder = run.folder / "ablations" / re.sub(r"\W+", "-", name)
    mark = hashlib.sha256(json.dumps([name, config, data_hash, results.imported_modules()]).encode()).hexdigest()
    if (cache := folder.with_suffix(".json")).exists() and (found := json.loads(cache.read_text()))["identity"] == mark:
        return found
    cfg = SimpleNamespace(**config)
    tokenizer, splits = added_by(way, source, words)
    shutil.rmtree(folder, ignore_errors=True)
    training.begin(cfg, folder / "init", tokenizer, splits, dev, mark)
    batch = min(cfg.batch_size, len(words))
    training.train_stage(cfg, folder / "init", folder / "a", tokenizer, sorted(splits), False, [], (cfg.lr_rows,),
                         training.in_turn(rows, training.shares(cfg, rows)["a"], cfg.seed, batch), batch, dev, mark, lambda **values: None)
    model = models.load_decoder(str(folder / "a"), "bf16")
    items = {kind: task.score(model, tokenizer, part, cfg.eval_batch_size, list(splits)) for kind, part in (("uses", uses), ("free", free))}
    results.write_atomic(cache, json.dumps({"identity": mark, "items": items}))
    shutil.rmtree(folder)
    return json.loads(cache.read_text())


def again(run, config, data_hash, tokenizer, arm, splits, ids, rows, dev):
    """Items of 04 for one arm trained through all stages with another seed; from its cache as `train_row`."""
    folder, cfg = run.folder / "ablations" / f"seed-{arm}", SimpleNamespace(**config | {"seed": config["seed"] + 1})
    mark = hashlib.sha256(json.dumps([arm, vars(cfg), data_hash, results.imported_modules()]).encode()).hexdigest()
    if (cache := folder.with_suffix(".json")).exists() and (found := json.loads(cache.read_text()))["identity"] == mark:
        return found["items"]
    shutil.rmtree(folder, ignore_errors=True)
    training.begin(cfg, folder / "init", tokenizer, splits, dev, mark)
    attention, source, skip = cfg.attention.split(), folder / "init", 0
    batch = min(cfg.batch_size, len({row["term"] for row in rows}))
    for stage, texts in training.shares(cfg, rows).items():
        modules = {"c1": attention, "c2": attention + cfg.mlp.split()}.get(stage, [])
        training.train_stage(cfg, source, folder / stage, tokenizer, ids, stage != "a", modules,
                             (cfg.lr_rows if stage == "a" else cfg.lr_rows_later, cfg.lr_matrices, cfg.lr_lora),
                             training.in_turn(rows, texts, cfg.seed, batch, skip), batch, dev, mark, lambda **values: None)
        shutil.rmtree(source)
        source, skip = folder / stage, skip + texts
    items = task.measure(models.load_decoder(str(source), "bf16"), tokenizer, run, list(splits))
    results.write_atomic(cache, json.dumps({"identity": mark, "items": items}))
    shutil.rmtree(folder)
    return json.loads(cache.read_text())["items"]


def curve(run, config, data_hash, chosen, rows, dev, uses, old):
    """Result rows of stage (a) with 0 to 200 texts for each of the terms that have the most."""
    counts = Counter(row["term"] for row in rows)
    words = [word for word, _ in counts.most_common(run.cfg.n_curve)]
    rows, uses = ([row for row in part if row["term"] in words] for part in (rows, uses))
    source, cfg = run.artifact("03_train", "new/init"), SimpleNamespace(**config)
    tokenizer, table = AutoTokenizer.from_pretrained(source, padding_side="left"), []
    ids = {word: task.ids_of(tokenizer, f" {word}")[0] for word in words}
    terms, known = [row for row in chosen if row["term"] in words], intrinsic.whole_words(old)
    for texts in TEXTS.get(run.profile, CURVE):
        folder = run.folder / "ablations" / f"texts-{texts}"
        mark = hashlib.sha256(json.dumps([texts, words, config, data_hash, results.imported_modules()]).encode()).hexdigest()
        cache = folder.with_suffix(".json")
        if not (cache.exists() and json.loads(cache.read_text())["identity"] == mark):
            facts, batch = {"steps": 0, "texts": 0}, min(cfg.batch_size, len(words))
            if texts:
                shown = training.in_turn(rows, texts, cfg.seed, batch)
                facts = training.train_stage(cfg, source, folder, tokenizer, sorted(ids.values()), False, [], (cfg.lr_rows,), shown, batch, dev,
                                             mark, lambda **values: None)
            model = models.load_decoder(str(folder if texts else source), "bf16")
            items = task.score(model, tokenizer, uses, cfg.eval_batch_size, list(ids.values()))
            looks = [f["anchors"] for f in intrinsic.look(model, tokenizer, terms, ids, known, cfg.seed) if f["side"] == "output"]
            row = {"identity": mark, "items": items, "steps": facts["steps"], "windows": facts["texts"], "looks": looks}
            results.write_atomic(cache, json.dumps(row))
            shutil.rmtree(folder, ignore_errors=True)
        found = json.loads(cache.read_text())
        more = {"texts": texts, "steps": found["steps"], "terms": len(words), "windows_per_term": found["windows"] / len(words)}
        table += [row | more | {"table": "texts"} for row in task.rows_of({"uses": found["items"]}, "new a")]
        if len(looks := [c for c in found["looks"] if c is not None]) > 1:
            table.append({"table": "texts", "model": "new a", "metric": "anchors", **stats.ratio_interval(looks, [1] * len(looks)), **more})
        run.log(texts=texts, steps=found["steps"], term_bits=next(r["value"] for r in table if r["texts"] == texts and r["metric"] == "term_bits"))
    return table, words


def main(run):
    data, trained = run.load("01_data"), run.load("03_train")
    run.load("04_eval")
    names = [n.strip() for n in run.cfg.only.split(";")] if run.cfg.only else [*ROWS, CURVE_ROW, SEED]
    if unknown := [n for n in names if n not in (*ROWS, CURVE_ROW, SEED)]:
        raise SystemExit(f"only={run.cfg.only!r}: no row {unknown[0]!r}; rows: {'; '.join((*ROWS, CURVE_ROW, SEED))}")
    was_tied = next(r["value"] for r in run.load("02_baseline")["rows"] if r["metric"] == "tied")
    impossible = {"tied"} if trained["config"]["tied"] or not was_tied else set()
    impossible |= {"last and first piece", "weighted pieces"} if trained["config"]["tied"] else set()
    names = [n for n in names if n not in impossible]
    chosen = json.loads(run.artifact("01_data", "terms.json").read_text(encoding="utf-8"))["terms"]
    rows, dev, uses, texts = (task.read_rows(run.artifact("01_data", f"{name}.jsonl")) for name in ("train", "dev", "uses", "texts"))
    measured = json.loads(run.artifact("04_eval", "items.json").read_text())
    free = [row for row in texts if row["set"] == ("free" if "free" in measured["new a"] else "general")]
    old, words = models.load_tokenizer(run.cfg.model), [row["term"] for row in chosen]
    done = {"as in 03": {"uses": measured["new a"]["uses"], "free": measured["new a"].get("free", measured["new a"].get("general"))}}
    for name in (n for n in names if n in ROWS):
        done[name] = train_row(run, name, trained["config"] | ROWS[name][1], results.result_hash(data), old, words, rows, dev, uses, free)["items"]
        spent = sum(i["nats"] for i in done[name]["uses"]) / sum(i["bytes"] for i in done[name]["uses"])
        run.log(row=name.replace(" ", "_"), nats_per_byte=spent)
    table = []
    for name, items in done.items():
        table += [row | {"table": "ablation"} for row in task.rows_of({"uses": items["uses"]}, name)]
        table += [row | {"table": "ablation"} for row in task.rows_of({"free": items["free"]}, name) if row["metric"] == "new_token_mass"]
        if name != "as in 03":
            table.append(task.delta_row("ablation minus 03", name, "bits_per_byte", done["as in 03"]["uses"], items["uses"]))
    if CURVE_ROW in names:
        found, curve_words = curve(run, trained["config"], results.result_hash(data), chosen, rows, dev, uses, old)
        base = [item for item, row in zip(measured["base"]["uses"], uses) if row["term"] in curve_words]
        table += found + [row | {"table": "texts base"} for row in task.rows_of({"uses": base}, "base")]
    if SEED in names:
        _, splits = added_by("entry and merges", old, words)
        pieces = sorted({i for word in words for i in task.ids_of(old, f" {word}")})
        found = {}
        for arm, firsts, ids in (("new", splits, sorted(splits)), ("control", {}, pieces)):
            tokenizer = AutoTokenizer.from_pretrained(run.artifact("03_train", f"{arm}/init"), padding_side="left")
            found[arm] = again(run, trained["config"], results.result_hash(data), tokenizer, arm, firsts, ids, rows, dev)
            run.log(row=f"{arm}_c2_seed_1", bits_per_byte=task.rows_of({"uses": found[arm]["uses"]}, arm)[0]["value"])
        for kind in measured["control c2"]:
            for seed, new, control in (("as in 03", measured["new c2"], measured["control c2"]), ("seed 1", found["new"], found["control"])):
                table += [row | {"table": "seeds", "seed": seed, "kind": kind} for name, items in (("new", new), ("control", control))
                          for row in task.rows_of({kind: items[kind]}, name) if row["metric"] == "bits_per_byte"]
                table.append(task.delta_row("seeds", "new minus control", "bits_per_byte", control[kind], new[kind]) | {"seed": seed, "kind": kind})
    run.save(table)


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
