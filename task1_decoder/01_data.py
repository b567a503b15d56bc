"""Question: what does the model learn from, and is what it is tested on really unseen?

Reads   the installed packages' source (or DATA=: JSONL/CSV/Parquet/hub id with `prompt`,`completion` or `text`)
Writes  results/<run>/task1_decoder/01_data.json and runs/<run>/task1_decoder/{train,dev,test,choice}.jsonl
Needs   about 40 s and 1.5 GB the first time, 15 s with the parsed corpus cached under runs/assets/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # a wrong one is said before the seconds that the next imports take

import json
import random
from dataclasses import dataclass

import numpy as np

from common import corpus, models
from task1_decoder import task


@dataclass(frozen=True)
class Config(task.Config):
    # Held-out items that 02 and 04 score: 200 put the 95 % interval of the NLL's change at +-0.08 nats a token; reading and
    # continuing them takes 50 s on 2 cores. Four times as many would halve the interval.
    n_test: int = 200
    # Items for the dev loss that picks the adapter. Small, because it is read four times in training: 64 cost 6 s a reading.
    n_dev: int = 64
    # Questions of our own multiple-choice task, built from test rows; 02 and 04 sample n_benchmark of them.
    n_choice: int = 120
    # Rows kept for training, 0 = all. All: the CPU run draws what its steps need, without repeats.
    n_train: int = 0


PROFILES = {
    "smoke": dict(
        n_test=12,  # enough for every code path
        n_dev=8,  # same
        n_choice=8,  # same
        n_train=64,  # same
    ),
    "cpu": dict(),
    "gpu": dict(
        n_test=1000,  # a GPU scores them in a minute, and the interval halves
        n_dev=256,  # same
        n_choice=1000,  # same
    ),
}


def corpus_rows():
    """Corpus functions as {id, prompt, completion, package, name, split}, with the counts of what was dropped."""
    rows, counts = corpus.load()
    return [{"id": r["id"], "prompt": r["code"], "completion": r["summary"], "package": r["package"], "split": r["split"],
             "name": f"{r['module']}.{r['qualname']}"} for r in rows], counts


def own_rows(run):
    """DATA= rows, de-duplicated, shuffled by seed and split. A bare `text` becomes its first quarter and the rest."""
    cfg = run.cfg
    least = cfg.n_test + cfg.n_dev + 32
    table = corpus.read_table(cfg.data, (("prompt", "completion"), ("text",)), minimum=least)
    if Path(cfg.data).expanduser().is_file():
        run.track(Path(cfg.data).expanduser().absolute())
    rows = []
    for number, row in enumerate(table, 1):
        if "text" in row:
            words = row["text"].split(" ")
            cut = max(1, len(words) // 4)
            row = {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:]), "style": "plain"}
        rows.append({"id": f"row{number}", "name": f"row {number}", "package": "own", **row})
    twins = corpus.near_duplicates([f"{r['prompt']} {r['completion']}" for r in rows])
    kept = [r for r, twin in zip(rows, twins) if twin is None]
    counts = {"parsed": len(rows), "near_duplicate": len(rows) - len(kept), "kept": len(kept)}
    if len(kept) < least:
        raise SystemExit(f"DATA={cfg.data}: {len(kept)} rows left after dropping {len(rows) - len(kept)} near-duplicates, the "
                         f"splits need {least}; add rows, or set n_test and n_dev lower")
    random.Random(cfg.seed).shuffle(kept)
    for i, row in enumerate(kept):
        row["split"] = "test" if i < cfg.n_test else "dev" if i < cfg.n_test + cfg.n_dev else "train"
    asked = {corpus.normalise(row["prompt"]) for row in kept if row["split"] != "train"}
    clean = [row for row in kept if row["split"] != "train" or corpus.normalise(row["prompt"]) not in asked]
    return clean, counts | {"prompt_held_out": len(kept) - len(clean)}


def choice_rows(test, pool, prompt, n, seed):
    """Which of four completions belongs to this prompt? The other three come from the same package, closest in length."""
    rng, rows = random.Random(seed), []
    for row in test[:n]:
        others = [o for o in pool if o["package"] == row["package"] and o["id"] != row["id"]]
        others = list({o["completion"]: o for o in others if o["completion"] != row["completion"]}.values())  # one right answer
        if len(others) < 3:
            continue
        others.sort(key=lambda o: abs(len(o["completion"]) - len(row["completion"])))
        choices = [row["completion"], *(o["completion"] for o in rng.sample(others[:12], 3))]
        rng.shuffle(choices)
        rows.append({"prompt": prompt.text(row["prompt"]), "choices": choices, "answer": choices.index(row["completion"])})
    return rows


def main(run):
    cfg = run.cfg
    if cfg.data != "corpus" and cfg.instruction == task.CORPUS_INSTRUCTION:
        raise SystemExit(f"DATA={cfg.data}: say what your prompts ask for, SET=\"'instruction=...'\" (SET=instruction= for nothing)")
    tokenizer = models.load_tokenizer(cfg.model)  # first, so that a wrong MODEL= is said before anything is built
    rows, counts = corpus_rows() if cfg.data == "corpus" else own_rows(run)
    splits = {}
    for split, size in (("test", cfg.n_test), ("dev", cfg.n_dev), ("train", cfg.n_train)):
        pool = sorted((r for r in rows if r["split"] == split), key=lambda r: r["id"])  # ids are hashes: independent of file order
        random.Random(cfg.seed).shuffle(pool)
        splits[split] = pool[:size or None]
        counts[f"{split}_pool"], counts[split] = len(pool), len(splits[split])

    if cfg.data == "corpus":
        as_corpus = {s: [{"summary": r["completion"], "code": r["prompt"]} for r in part] for s, part in splits.items()}
    else:  # own answers may repeat ("yes"), questions and whole rows may not
        as_corpus = {s: [{"summary": r["prompt"], "code": f"{r['prompt']} {r['completion']}"} for r in part] for s, part in splits.items()}
    leaks = {(split, kind): n for split in ("test", "dev") for kind, n in corpus.leaks(as_corpus["train"], as_corpus[split]).items()}
    if any(leaks.values()):
        raise SystemExit(f"training shares rows with the held-out splits: {leaks}; the split is broken, nothing was written")

    prompt = task.Prompt(tokenizer, cfg, style=splits["test"][0].get("style", "chat"))
    table = [{"table": "counts", "model": "all", "metric": k, "value": v} for k, v in counts.items()]
    table += [{"table": "leaks", "model": split, "metric": kind, "value": n, "n": counts[split]} for (split, kind), n in leaks.items()]
    if cfg.data == "corpus":
        table += [{"table": "packages", "model": name, "metric": version, "value": sum(r["package"] == name for r in rows)}
                  for name, version in corpus.versions().items()]
    for split, part in splits.items():
        for side, cap, extra in (("prompt", cfg.max_prompt_tokens, 0), ("completion", cfg.max_completion_tokens, 1)):  # 1: EOS
            lengths = np.array([len(ids) + extra for ids in tokenizer([r[side] for r in part], add_special_tokens=False).input_ids])
            found = {f"p{q}": float(np.percentile(lengths, q)) for q in (50, 90, 99)} | {"cut_share": float(np.mean(lengths > cap))}
            table += [{"table": "tokens", "model": split, "metric": f"{side}_tokens_{name}", "value": value, "n": len(part)}
                      for name, value in found.items()]

    code, summary = task.SHOTS[2]  # ours, so it may be printed in full
    row = {"prompt": code, "completion": summary} if cfg.data == "corpus" else splits["train"][0]
    example = task.encode(prompt, row, cfg)
    shown = [{"table": "example", "position": i, "token": tokenizer.decode([t]), "id": t, "trained": label != -100}
             for i, (t, label) in enumerate(zip(example["input_ids"], example["labels"]))]
    for row in shown:
        print(f"{row['position']:4} {row['id']:6} {'train' if row['trained'] else '  -  '} {row['token']!r}")
    assert len(example["labels"]) == len(example["input_ids"]) and example["labels"][0] == -100

    for split, part in splits.items():
        results.write_atomic(run.folder / f"{split}.jsonl", "".join(json.dumps(r) + "\n" for r in part))
    pool = sorted((r for r in rows if r["split"] == "test"), key=lambda r: r["id"])
    choice = choice_rows(splits["test"], pool, prompt, cfg.n_choice, cfg.seed)
    results.write_atomic(run.folder / "choice.jsonl", "".join(json.dumps(r) + "\n" for r in choice))
    run.save(table + shown, artifacts=["train.jsonl", "dev.jsonl", "test.jsonl", "choice.jsonl"])
    run.log(train=counts["train"], dev=counts["dev"], test=counts["test"], leaks=sum(leaks.values()))


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
