"""Question: which words does the vocabulary lack, and are there texts enough to teach and to test each of them?

Reads   docstrings of the installed packages (or DATA=: JSONL/CSV/Parquet/hub id with `text`), and terms.csv beside this script
Writes  results/<run>/task3_tokenizer/01_data.json; under runs/<run>/task3_tokenizer/ terms.json, tokenizer/
        (with the new words) and {train,plain,dev,uses,texts,known}.jsonl
Needs   about 30 s and 1 GB; 70 s if the corpus is not yet parsed
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # a wrong one is said before the seconds that the next imports take

import csv
import io
import json
import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass

from common import models
from task3_tokenizer import task, terms, vocabulary, windows


@dataclass(frozen=True)
class Config(task.Config):
    # Terms taken if terms="found". Twenty fit a report, and 51 texts of each into the minutes of a CPU run.
    n_terms: int = 20
    # Training documents that a word must stand in to be found: the assignment's lower bound is 50 texts a
    # token, and near copies of a window do not count.
    least_texts: int = 60
    # Distinct windows that a term must have to train on, found or listed. 03 shows 51 of each term, and
    # shares what there is of a term that has fewer. The rarest of terms.csv has 50 to 62: it depends on the
    # profile, and on the version of Python, whose own library is part of the corpus. 40 leaves room.
    least_windows: int = 40
    # Held-out documents a term must stand in: below 20, one odd text decides.
    least_held_out: int = 20
    # Windows kept per term for training, one per document: 03 uses the first 51, the curve over texts per token of `make ablations` 200.
    n_windows: int = 200
    # Real single-token words that 03 hides, relearns and compares with what they were; 8 cost half a minute.
    n_known: int = 8
    # Uses of each term for the dev score after every stage.
    n_dev: int = 2
    # Windows without any term for the row of `make ablations` that mixes them in: as many as stage (a) has of five terms, a fifth of all there.
    n_plain: int = 120


PROFILES = {
    "smoke": dict(
        n_windows=64,  # the least that is accepted, and a few
        n_known=2,  # same
        n_dev=1,  # same
        n_plain=5,  # same
    ),
    "cpu": dict(),
    "gpu": dict(
        n_terms=48,  # seconds more each
        n_windows=1000,  # all there are, but for one term
        least_texts=50,  # the assignment's lower bound: the more windows, the more of them are near copies of another
        n_known=16,  # seconds more each
        n_plain=500,  # a third of the windows of that row here
    ),
}


def listed(cfg):
    """Path of the list of terms; None if they are to be found."""
    if cfg.terms == "found":
        return None
    path = task.HERE / {"ru": "terms_ru.csv"}.get(cfg.terms, cfg.terms)
    path = path if path.is_file() else Path(cfg.terms).expanduser()
    if not path.is_file():
        raise SystemExit(f"terms={cfg.terms}: no such file; a CSV with columns {','.join(terms.COLUMNS)}, or terms=found or terms=ru")
    return path


def choose(cfg, tokenizer, found, path, train, held_out):
    """The terms of the list, or all that were found and accepted, best first; each {term, anchors, negative_anchors, definition}. SystemExit
    for one that has too few documents."""
    if path is None:
        return [{"term": r["term"], "anchors": [], "negative_anchors": [], "definition": ""} for r in found if r["rejected"] is None]
    chosen = terms.read_terms(path, tokenizer)
    for row in chosen:
        seen = [sum(bool(windows.places(text, row["term"])) for text in texts) for texts in (train, held_out)]
        if seen[0] < cfg.least_windows or seen[1] < cfg.least_held_out:
            raise SystemExit(f"{path.name}: {row['term']!r} is in {seen[0]} training and {seen[1]} held-out documents, "
                             f"{cfg.least_windows} and {cfg.least_held_out} needed: more texts, "
                             "another word, or SET=terms=found")
    return chosen


def known_words(cfg, tokenizer, train, held_out, general, chosen, found):
    """Words of the domain that are one token already, about as frequent as the terms: [{"term", "pieces" (ids it would be made of)}]."""
    occurrences, spreads = terms.uses(train)
    spread = sorted(spreads[row["term"]] for row in chosen)
    middle = spread[len(spread) // 2]
    other, _ = terms.uses(general)
    _, held_documents = terms.uses(held_out)
    total, other_total = sum(occurrences.values()), max(1, sum(other.values()))
    names = [w for w, n in spreads.items() if middle / 2 <= n <= 2 * middle and w.isalpha() and w.islower() and len(w) > 4
             and held_documents[w] >= cfg.least_held_out and len(vocabulary.pieces(tokenizer, f" {w}")) == 1]
    names.sort(key=lambda w: (-terms.keyness(occurrences[w], total, other[w], other_total), w))
    hidden = vocabulary.without(tokenizer, names[:cfg.n_known])
    return [{"term": w, "pieces": task.ids_of(hidden, f" {w}")} for w in names[:cfg.n_known]]


def shortened(text: str) -> str:
    """Whole words from the beginning, about 180 characters: as long as a window."""
    return text if len(text) <= 180 else text[:text.rfind(" ", 0, 180)]


def main(run):
    cfg, rng = run.cfg, random.Random(run.cfg.seed)
    tokenizer = models.load_tokenizer(cfg.model)
    vocabulary.check_kind(tokenizer, cfg.model)
    path = listed(cfg)
    for file in filter(None, (path, Path(cfg.data).expanduser(), task.HERE / "ru_texts.jsonl" if cfg.terms == "ru" else None)):
        if file.is_file():
            run.track(file.absolute())
    docs = sorted(task.documents(cfg), key=lambda d: d["text"])
    split = {name: [d for d in docs if d["split"] == name] for name in ("train", "dev", "test")}
    general = task.general_texts()
    train, held_out = ([d["text"] for d in split[s]] for s in ("train", "test"))
    found = terms.find(tokenizer, train, held_out, general, cfg.least_texts, cfg.least_held_out)
    chosen = choose(cfg, tokenizer, found, path, train, held_out)
    extended, _ = vocabulary.extend(tokenizer, [row["term"] for row in chosen])

    def fits(row):  # a term whose tokens reach over its borders could not be scored on its own
        return task.encode(tokenizer, row)[1] is not None and task.encode(extended, row)[1] is not None
    drawn = [w for row in chosen for w in windows.draw(split["train"], row["term"], 2 * cfg.n_windows, rng, fits)]
    parts = {"train": windows.distinct(drawn, cfg.n_windows)}
    n_train = Counter(w["term"] for w in parts["train"])
    for row in chosen if path else []:
        if n_train[row["term"]] < cfg.least_windows:
            have = n_train[row["term"]]
            raise SystemExit(f"{path.name}: {row['term']!r} has {have} distinct windows to train on, "
                             f"{cfg.least_windows} needed: more texts, another word, "
                             f"or SET=least_windows={have}")
    chosen = [row for row in chosen if n_train[row["term"]] >= cfg.least_windows]
    if path is None:
        chosen = chosen[:cfg.n_terms]
    if not chosen:
        raise SystemExit(f"no word has two tokens or more, {cfg.least_texts} training documents, "
                         f"{cfg.least_windows} distinct windows in them and {cfg.least_held_out} held-out "
                         "documents: more texts, or SET='least_texts=.. least_windows=.. least_held_out=..'")
    words = [row["term"] for row in chosen]
    extended, added = vocabulary.extend(tokenizer, words)
    parts["train"] = [w for w in parts["train"] if w["term"] in words]
    known = known_words(cfg, tokenizer, train, held_out, general, chosen, found)
    drawn = [{**w, "split": s} for k in known for s, n in (("train", 2 * cfg.n_windows), ("test", 2 * cfg.n_uses))
             for w in windows.draw(split[s], k["term"], n, rng, lambda row: True)]
    parts["known"] = windows.distinct(drawn, cfg.n_windows)
    parts["dev"] = [w for word in words for w in windows.draw(split["dev"], word, cfg.n_dev, rng, fits)]
    taken, rare_first = set(), sorted(words, key=lambda w: next((r["held_out_documents"] for r in found if r["term"] == w), 0))
    uses = [w for word in rare_first for w in windows.draw(split["test"], word, 3 * cfg.n_uses, rng, fits, taken)]  # a document serves one term only
    uses.sort(key=lambda w: words.index(w["term"]))
    new_ids = {what["id"] for what in added.values()}
    free = [d["text"] for d in split["test"] if not new_ids & {*task.ids_of(extended, d["text"])}]
    texts = [{"set": kind, "text": shortened(t)}
             for kind, pool in (("domain", held_out), ("free", free), ("general", general))
             for t in rng.sample(pool, min(len(pool), 2 * cfg.n_texts))]

    plain = [t for t in (d["text"] for d in split["train"]) if not new_ids & {*task.ids_of(extended, t)}]
    parts["plain"] = [{"text": shortened(t)} for t in rng.sample(plain, min(len(plain), cfg.n_plain))]

    taught = parts["train"] + [w for w in parts["known"] if w["split"] == "train"] + parts["plain"]
    parts["uses"], dropped_uses = windows.fresh(taught, uses, "term", cfg.n_uses)
    parts["texts"], dropped_texts = windows.fresh(taught, texts, "set", cfg.n_texts)
    kept, sets = Counter(row["term"] for row in parts["uses"]), Counter(row["set"] for row in parts["texts"])
    parts["texts"] = [row for row in parts["texts"] if sets[row["set"]] > 1]
    leaks = sum(windows.twins_of(taught, parts["uses"])) + sum(windows.twins_of(taught, parts["texts"]))
    if leaks:
        raise SystemExit(f"{leaks} held-out windows repeat training: the gate in 01_data.py is broken")
    if few := [word for word in words if kept[word] < 2]:
        raise SystemExit(f"{few[0]!r} has {kept[few[0]]} held-out uses that are no near copies, 2 needed: more texts, or another word")
    if not parts["dev"]:
        raise SystemExit("no dev document has a term: more texts, or a split column with dev in it")

    table = [{"table": "counts", "model": "all", "metric": k, "value": v} for k, v in {
        "documents": len(docs), **{f"{s}_documents": len(d) for s, d in split.items()}, "words_seen": len(terms.uses(train)[0]),
        "candidates": len(found), "accepted": sum(r["rejected"] is None for r in found), "terms_taken": len(words),
        "new_entries": len(added), "training_windows": len(parts["train"]),
        "least_training_windows_of_a_term": min(n_train[word] for word in words),
        "held_out_uses": len(parts["uses"]),
        "test_documents_without_a_term": len(free),
        "held_out_uses_dropped_as_near_copies": dropped_uses, "held_out_texts_dropped_as_near_copies": dropped_texts,
        "held_out_windows_near_training": leaks}.items()]
    table += [{"table": "candidates", "model": r["term"], "metric": "score", "value": r["score"], "keyness": r["keyness"],
               "pieces": [tokenizer.convert_tokens_to_string([p]) for p in r["pieces"]], "documents": r["documents"],
               "held_out_documents": r["held_out_documents"], "rejected": r["rejected"], "taken": r["term"] in words} for r in found]
    table += [{"table": "rejected", "model": reason, "metric": "words", "value": n} for reason, n in
              Counter(" ".join("N" if w.isdigit() else w for w in r["rejected"].split()) for r in found if r["rejected"]).most_common()]
    table += [{"table": "terms", "model": r["term"], "metric": "training_windows", "value": n_train[r["term"]], "held_out_uses": kept[r["term"]],
               "anchors": r["anchors"], "negative_anchors": r["negative_anchors"], "definition": r["definition"]} for r in chosen]
    entries = {what["term"]: what["id"] for what in added.values() if what["term"]}
    for name, surface in {"after a blank": " {}", "plural": " {}s", "in brackets": "({})", "at a line's start": "\n{}"}.items():
        forms = [(w, surface.format(w)) for w in words]
        table.append({"table": "surface", "model": name, "metric": "share_of_terms_in_one_id", "n": len(forms),
                      "value": sum(entries[w] in task.ids_of(extended, form) for w, form in forms) / max(1, len(forms))})
    caught = Counter()
    for doc in split["test"]:  # as it was written, line breaks and all
        spelled = task.ids_of(extended, doc["raw"])
        caught["by id"] += sum(i in set(entries.values()) for i in spelled)
        caught["mentions"] += sum(len(re.findall(rf"(?<![^\W_]){re.escape(w)}(?![^\W_])", doc["raw"])) for w in words)
    table.append({"table": "surface", "model": "all mentions in raw held-out text", "metric": "share_of_mentions_in_one_id",
                  "value": caught["by id"] / max(1, caught["mentions"]), "n": caught["mentions"]})

    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(terms.COLUMNS)
    writer.writerows([r["term"], "", "", ""] for r in found if r["rejected"] is None)
    results.write_atomic(run.folder / "found.csv", stream.getvalue())
    lexicon = {"terms": chosen, "known": known, "added": added}
    results.write_atomic(run.folder / "terms.json", json.dumps(lexicon, ensure_ascii=False))
    shutil.rmtree(run.folder / "tokenizer", ignore_errors=True)
    extended.save_pretrained(run.folder / "tokenizer")
    for name, rows in parts.items():
        results.write_atomic(run.folder / f"{name}.jsonl", task.as_lines(rows))
    run.save(table, artifacts=["terms.json", "tokenizer", "found.csv", *(f"{name}.jsonl" for name in parts)])
    run.log(candidates=len(found), accepted=sum(r["rejected"] is None for r in found), terms=len(words),
            least_windows_of_a_term=min(n_train[word] for word in words), uses=len(parts["uses"]),
            leaks=leaks)


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
