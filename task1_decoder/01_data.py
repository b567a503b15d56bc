"""Question: what does the model learn from, and is what it is tested on really unseen?

Reads   the installed packages' source (or DATA=: a table, a folder of texts or a hub id, with `prompt` and
        `completion`, chat `messages`, or `text`)
Writes  results/<run>/task1_decoder/01_data.json, runs/<run>/task1_decoder/{train,dev,test,choice}.jsonl
Needs   about 40 s and 1.5 GB the first time, 15 s with the parsed corpus cached under runs/assets/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import itertools
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np

from common import models, stats
from sources import corpus
from task1_decoder import task


@dataclass(frozen=True)
class Config(task.Config):
    # Held-out items that 02 and 04 score: 200 put the 95 % interval of the NLL's change at +-0.08 nats a
    # token; scoring them takes 50 s on 2 cores. Four times as many would halve the interval.
    n_test: int = 200
    # Items of the dev loss, which picks the adapter. They are few, because training computes it four times:
    # 64 cost 6 s each time.
    n_dev: int = 64
    # Questions of our own multiple-choice task, built from test rows; 02 and 04 sample n_benchmark of them.
    n_choice: int = 120
    # Rows kept for training, 0 = all. The CPU run draws what its steps need, without repeats.
    n_train: int = 0


PROFILES = {
    "smoke": dict(n_test=12, n_dev=8, n_choice=8, n_train=64),
    "cpu": dict(),
    "gpu": dict(n_test=1000, n_dev=256, n_choice=1000),  # a GPU scores 1,000 in a minute; the interval halves
}


# ---------------------------------------------------------------------------------------- rows and filters

def corpus_rows() -> tuple[list[dict], dict[str, int]]:
    """Corpus functions as {id, prompt, completion, package, name, split}, and counts of what was dropped."""
    rows, counts = corpus.load()
    return [{"id": r["id"], "prompt": r["code"], "completion": r["summary"], "package": r["package"],
             "split": r["split"], "name": f"{r['module']}.{r['qualname']}"} for r in rows], counts


def own_rows(run) -> tuple[list[dict], dict[str, int]]:
    """DATA= rows without near-duplicates, split by seed; a `text` becomes its first quarter and the rest."""
    cfg = run.cfg
    least = cfg.n_test + cfg.n_dev + 32
    from sources import data
    table = data.read_table(cfg.data, data.FORMS["task1_decoder"], minimum=least, columns=cfg.columns)
    if cfg.instruction == task.CORPUS_INSTRUCTION:
        data.check_instruction(cfg.data, table[0])
    if Path(cfg.data).expanduser().exists():
        run.track(Path(cfg.data).expanduser())
    rows = []
    for number, row in enumerate(table, 1):
        if "text" in row:
            words = row["text"].split(" ")
            cut = max(1, len(words) // 4)
            row = {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:]),
                   "style": "plain"}
        rows.append({"id": f"row{number}", "name": f"row {number}", "package": "own", **row})
    texts = [f"{asked(row)} {row['completion']}" for row in rows]
    twins, repeated = corpus.near_duplicates(texts), len(texts) - len(set(texts))
    kept = [row for row, twin in zip(rows, twins) if twin is None]
    if len(kept) < least:
        raise SystemExit(f"DATA={cfg.data}: {len(kept)} rows left after dropping {len(rows) - len(kept)} "
                         f"near-duplicates, the splits need {least}; add rows, or set n_test and n_dev lower")
    random.Random(cfg.seed).shuffle(kept)
    for i, row in enumerate(kept):
        row["split"] = "test" if i < cfg.n_test else "dev" if i < cfg.n_test + cfg.n_dev else "train"
    held_out = {corpus.normalise(asked(row)) for row in kept if row["split"] != "train"}
    clean = [row for row in kept
             if row["split"] != "train" or corpus.normalise(asked(row)) not in held_out]
    return clean, {"parsed": len(rows), "repeated": repeated,
                   "near_duplicate": len(rows) - len(kept) - repeated, "kept": len(kept),
                   "prompt_held_out": len(kept) - len(clean)}


def asked(row: dict) -> str:
    """Everything that stands before a row's completion: the turns of a chat, and the prompt."""
    return " ".join([*itertools.chain(*row.get("turns", ())), row["prompt"]])


def shuffled(rows: list[dict], split: str, seed: int) -> list[dict]:
    """The rows of a split in a random order, which depends on their ids and not on the order of files."""
    pool = sorted((row for row in rows if row["split"] == split), key=lambda row: row["id"])
    random.Random(seed).shuffle(pool)
    return pool


def leaks(splits: dict[str, list[dict]], own: bool) -> dict[tuple[str, str], int]:
    """{(split, kind): held-out rows that training repeats}. SystemExit if there are any.

    Own answers may repeat ("yes"), questions and whole rows may not; of the corpus neither summary nor code.
    """
    def texts(part):
        if own:
            return [{"summary": asked(r), "code": f"{asked(r)} {r['completion']}"} for r in part]
        return [{"summary": r["completion"], "code": r["prompt"]} for r in part]
    counts = {(split, kind): n for split in ("test", "dev")
              for kind, n in corpus.leaks(texts(splits["train"]), texts(splits[split])).items()}
    if any(counts.values()):
        raise SystemExit(f"training shares rows with the held-out splits: {counts}; nothing was written")
    return counts


def choice_rows(test: list[dict], pool: list[dict], prompt: task.Prompt, n: int, seed: int) -> list[dict]:
    """Multiple choice: which of four completions belongs to this prompt? {"prompt", "choices", "answer"}.

    The three wrong ones come from the same package and are among the closest in length.
    """
    rng, questions = random.Random(seed), []
    for row in test[:n]:
        right = row["completion"]
        same_package = [other["completion"] for other in pool if other["package"] == row["package"]]
        wrong = [text for text in dict.fromkeys(same_package) if text != right]
        if len(wrong) >= 3:
            wrong.sort(key=lambda text: abs(len(text) - len(right)))
            choices = [right, *rng.sample(wrong[:12], 3)]
            rng.shuffle(choices)
            questions.append({"prompt": prompt.of(row).text(row["prompt"]), "choices": choices,
                              "answer": choices.index(right)})
    return questions


# ----------------------------------------------------------------------------------- what the report shows

def length_rows(tokenizer, cfg, splits: dict[str, list[dict]]) -> list[dict]:
    """Percentiles of the lengths in tokens, and the share that is cut. Earlier turns count as prompt."""
    table = []
    for split, part in splits.items():
        for side, limit, eos in (("prompt", cfg.max_prompt_tokens, 0),
                                 ("completion", cfg.max_completion_tokens, 1)):
            texts = [asked(row) if side == "prompt" else row[side] for row in part]
            ids = tokenizer(texts, add_special_tokens=False).input_ids
            lengths = np.array([len(text) + eos for text in ids])
            values = {f"{side}_tokens_p{q}": float(np.percentile(lengths, q)) for q in (50, 90, 99)}
            values[f"{side}_tokens_cut_share"] = float(np.mean(lengths > limit))
            table += stats.facts("tokens", split, values, n=len(part))
    return table


def example_rows(tokenizer, example: dict) -> list[dict]:
    """One encoded example token by token: which of them are trained."""
    return [{"table": "example", "position": position, "token": tokenizer.decode([i]), "id": i,
             "trained": position >= len(example["prompt"])}
            for position, i in enumerate(example["prompt"] + example["answer"])]


def main(run):
    cfg, own = run.cfg, run.cfg.data != "corpus"
    # first, so that a wrong MODEL= is reported before anything is built
    tokenizer = models.load_tokenizer(cfg.model)
    rows, counts = own_rows(run) if own else corpus_rows()
    sizes = {"test": cfg.n_test, "dev": cfg.n_dev, "train": cfg.n_train}
    pools = {split: shuffled(rows, split, cfg.seed) for split in sizes}
    splits = {split: pools[split][:size or None] for split, size in sizes.items()}
    for split in sizes:
        counts |= {f"{split}_pool": len(pools[split]), split: len(splits[split])}
    leaked = leaks(splits, own)

    prompt = task.Prompt(tokenizer, cfg, style=splits["test"][0].get("style", "chat"))
    table = stats.facts("counts", "all", counts)
    for (split, kind), n in leaked.items():
        table += stats.facts("leaks", split, {kind: n}, n=counts[split])
    if not own:
        sizes_of = Counter(row["package"] for row in rows)
        for name, version in corpus.versions().items():
            table += stats.facts("packages", name, {version: sizes_of[name]})
    table += length_rows(tokenizer, cfg, splits)
    code, summary = task.SHOTS[2]  # ours, so it may be printed in full
    shown = splits["train"][0] if own else {"id": "ours", "prompt": code, "completion": summary}
    example = prompt.encode(shown)
    table += example_rows(tokenizer, example)
    cut = {row["metric"].partition("_")[0]: row["value"] for row in table
           if row.get("name") == "train" and row["metric"].endswith("cut_share")}
    run.log(cut_prompts=f"{cut['prompt']:.0%}", max_prompt_tokens=cfg.max_prompt_tokens,
            cut_completions=f"{cut['completion']:.0%}", max_completion_tokens=cfg.max_completion_tokens)
    run.log(trained=repr(tokenizer.decode(example["answer"])), after_tokens=len(example["prompt"]))

    for split, part in splits.items():
        results.write_rows(run.folder / f"{split}.jsonl", part)
    pool = sorted(pools["test"], key=lambda row: row["id"])
    questions = choice_rows(splits["test"], pool, prompt, cfg.n_choice, cfg.seed)
    results.write_rows(run.folder / "choice.jsonl", questions)
    run.save(table, artifacts=["train.jsonl", "dev.jsonl", "test.jsonl", "choice.jsonl"])
    run.log(**counts, leaks=sum(leaked.values()))


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
