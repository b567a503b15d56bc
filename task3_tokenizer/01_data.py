"""Question: which words does the vocabulary lack, and are there texts enough to teach and test each of them?

Reads   docstrings of the installed packages (or DATA=: see sources/data.py), and terms.csv
Writes  results/<run>/task3_tokenizer/01_data.json; under runs/<run>/task3_tokenizer/ terms.json, tokenizer/
        (with the new words) and {train,dev,test}.jsonl
Needs   about 30 s and 1 GB; 70 s if the corpus is not yet parsed
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import json
import random
import shutil
from collections import Counter
from dataclasses import dataclass

from common import models, stats
from sources import corpus, data
from task3_tokenizer import task, terms, vocabulary, windows


@dataclass(frozen=True)
class Config(task.Config):
    # Terms taken if terms="found". Twenty fit into a report, and 51 texts of each into the minutes of a CPU
    # run.
    n_terms: int = 20
    # Training documents in which a word must occur to be found. The assignment asks for at least 50 texts per
    # token, and near copies of a window do not count.
    least_texts: int = 60
    # Distinct training windows that a term must have, found or listed. 03 trains on 51 of each term, and
    # shares what there is of a term that has fewer. The rarest of terms.csv has 50 to 62: it depends on the
    # profile and on the version of Python, whose own library is part of the corpus. 40 leaves room.
    least_windows: int = 40
    # Held-out documents in which a term must occur: below 20, one odd text decides.
    least_held_out: int = 20
    # Windows kept per term for training, one per document: 03 uses the first 51, the curve over texts per
    # token of `make ablations` uses 200.
    n_windows: int = 200
    # Windows of each term for the dev score after every stage.
    n_dev: int = 2


PROFILES = {
    "smoke": dict(
        # The least that is accepted, and a few.
        n_windows=64,
        n_dev=1,
    ),
    "cpu": dict(),
    "gpu": dict(
        n_terms=48,
        # All there are, but for one term.
        n_windows=1000,
        # The assignment's lower bound: the more windows, the more of them are near copies of another.
        least_texts=50,
    ),
}


def choose(cfg, tokenizer, candidates, path, train, held_out):
    """The terms of the list, or all candidates that were accepted, best first: {term, anchors,
    negative_anchors}. SystemExit for a listed one that has too few documents."""
    if path is None:
        return [{"term": r["term"], "anchors": [], "negative_anchors": []}
                for r in candidates if r["rejected"] is None]
    chosen = terms.read_terms(path, tokenizer)
    for row in chosen:
        n, n_held_out = (sum(bool(windows.places(text, row["term"])) for text in texts)
                         for texts in (train, held_out))
        if n < cfg.least_windows or n_held_out < cfg.least_held_out:
            raise SystemExit(f"{path.name}: {row['term']!r} is in {n} training and {n_held_out} held-out "
                             f"documents, {cfg.least_windows} and {cfg.least_held_out} needed: more texts, "
                             "another word, or SET=terms=found")
    return chosen


def without_near_copies(docs):
    """Own documents, of which near copies stay in one split only: in test before dev before train."""
    docs = sorted(docs, key=lambda d: (("test", "dev", "train").index(d["split"]), d["text"]))
    twins = corpus.near_duplicates([d["text"] for d in docs])
    return [d for d, twin in zip(docs, twins) if twin is None]


def shortened(text: str) -> str:
    """Whole words from the beginning, about 180 characters: as long as a window."""
    return text if len(text) <= 180 else text[:text.rfind(" ", 0, 180)]


def main(run):
    cfg, rng = run.cfg, random.Random(run.cfg.seed)
    tokenizer = models.load_tokenizer(cfg.model)
    vocabulary.check_kind(tokenizer, cfg.model)
    path = data.terms_file(cfg.terms)
    own = task.HERE / "ru_texts.jsonl" if cfg.terms == "ru" else None
    if cfg.data != "corpus":
        own = Path(cfg.data).expanduser()
    for file in (file for file in (path, own) if file and file.exists()):
        run.track(file.absolute())

    # Texts and candidates.
    found, n_texts = task.documents(cfg)
    docs = sorted(found if cfg.data == "corpus" else without_near_copies(found), key=lambda d: d["text"])
    split = {name: [d for d in docs if d["split"] == name] for name in ("train", "dev", "test")}
    train, held_out = ([d["text"] for d in split[name]] for name in ("train", "test"))
    sciq = [row["support"] for row in corpus.general_english()]  # general English that nothing here trains on
    general = sorted({" " + " ".join(text.split()) for text in sciq if len(text) > 200})
    candidates = terms.find(tokenizer, train, held_out, general, cfg.least_texts, cfg.least_held_out)
    chosen = choose(cfg, tokenizer, candidates, path, train, held_out)
    words = [row["term"] for row in chosen]
    extended, _ = vocabulary.extend(tokenizer, words)

    def fits(window):  # if a token reached over the borders of the term, it could not be scored on its own
        return all(task.encode(way, window)[1] is not None for way in (tokenizer, extended))

    # Training windows; a term stays if it has enough that are no near copies of each other.
    drawn = windows.draw(split["train"], words, 2 * cfg.n_windows, rng, fits)
    taught = windows.distinct([], drawn, "term", cfg.n_windows)
    n_train = Counter(w["term"] for w in taught)
    few = [word for word in words if n_train[word] < cfg.least_windows]
    if path and few:
        n = n_train[few[0]]
        raise SystemExit(f"{path.name}: {few[0]!r} has {n} distinct windows to train on, {cfg.least_windows} "
                         f"needed: more texts, another word, or SET=least_windows={n}")
    chosen = [row for row in chosen if row["term"] not in few][:None if path else cfg.n_terms]
    if not chosen:
        raise SystemExit(f"no word has two tokens or more, {cfg.least_texts} training documents, "
                         f"{cfg.least_windows} distinct windows in them and {cfg.least_held_out} held-out "
                         "documents: more texts, or SET='least_texts=.. least_windows=.. least_held_out=..'")
    words = [row["term"] for row in chosen]
    extended, pieces_of = vocabulary.extend(tokenizer, words)
    taught = [w for w in taught if w["term"] in words]

    # Held-out windows, the rarest term first, because a document serves one term only; and texts of other
    # kinds.
    dev = windows.draw(split["dev"], words, cfg.n_dev, rng, fits)
    spread = {r["term"]: r["held_out_documents"] for r in candidates}
    rarest_first = sorted(words, key=lambda word: spread.get(word, 0))
    uses = windows.draw(split["test"], rarest_first, 3 * cfg.n_uses, rng, fits, once=True)
    uses.sort(key=lambda w: words.index(w["term"]))
    without = [text for text in held_out if pieces_of.keys().isdisjoint(task.ids_of(extended, text))]
    pools = {"any text": held_out, "without terms": without, "general English": general}
    others = [{"set": kind, "text": shortened(text)} for kind, pool in pools.items()
              for text in rng.sample(pool, min(len(pool), 2 * cfg.n_texts))]

    # Nothing held out may be a near copy of a training window or of another held-out text of its kind.
    uses = [{"set": "term windows", **w} for w in windows.distinct(taught, uses, "term", cfg.n_uses)]
    others = windows.distinct(taught, others, "set", cfg.n_texts)
    leaks = sum(windows.near_copies(taught, uses)) + sum(windows.near_copies(taught, others))
    assert not leaks, f"{leaks} held-out windows repeat training"
    n_uses = Counter(row["term"] for row in uses)
    if few := [word for word in words if n_uses[word] < 2]:
        raise SystemExit(f"{few[0]!r} has {n_uses[few[0]]} held-out windows without near copies, 2 needed: "
                         "more texts, or another word")
    if not dev:
        raise SystemExit("no dev document has a term: more texts, or a split column with dev in it")

    counts = {"texts": n_texts, "short_or_repeated": n_texts - len(found),
              "near_duplicate": len(found) - len(docs), "documents": len(docs),
              **{f"{name}_documents": len(part) for name, part in split.items()},
              "candidates": len(candidates),
              "accepted": sum(r["rejected"] is None for r in candidates), "terms_taken": len(words),
              "new_entries": len(pieces_of), "training_windows": len(taught),
              "least_training_windows_of_a_term": min(n_train[word] for word in words),
              "held_out_uses": len(uses), "held_out_windows_near_training": leaks}
    table = stats.facts("counts", "all", counts)
    table += [{"table": "candidates", "name": r["term"], "metric": "score", "value": r["score"], **r,
               "taken": r["term"] in words} for r in candidates]
    table += [{"table": "terms", "name": r["term"], "metric": "training_windows", "value": n_train[r["term"]],
               "held_out_uses": n_uses[r["term"]], **r} for r in chosen]
    run.folder.mkdir(parents=True, exist_ok=True)
    lexicon = {"terms": chosen, "pieces_of": list(pieces_of.items())}  # JSON has no numbers as keys
    results.write_atomic(run.folder / "terms.json", json.dumps(lexicon, ensure_ascii=False))
    shutil.rmtree(run.folder / "tokenizer", ignore_errors=True)
    extended.save_pretrained(run.folder / "tokenizer")
    for name, rows in {"train": taught, "dev": dev, "test": uses + others}.items():
        results.write_rows(run.folder / f"{name}.jsonl", rows)
    run.save(table, artifacts=["terms.json", "tokenizer", "train.jsonl", "dev.jsonl", "test.jsonl"])
    run.log(**counts)


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
