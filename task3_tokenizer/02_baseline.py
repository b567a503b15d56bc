"""Question: how are these words spelled now, which way of adding them is right, and how well does the model know them?

Reads   terms.json, tokenizer/ and {uses,texts}.jsonl of 01, under runs/<run>/task3_tokenizer/
Writes  results/<run>/task3_tokenizer/02_baseline.json, runs/<run>/task3_tokenizer/items_base.json (per text, for the paired tests of 04)
Needs   about 1 min and 2 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # a wrong one is said before the seconds that the next imports take

import json
import math
import re
from dataclasses import dataclass

from common import models
from task3_tokenizer import task, vocabulary


@dataclass(frozen=True)
class Config(task.Config):
    # Windows, every k-th, on which the ways of adding tokens are compared, beside sentences of ours.
    n_compare: int = 200


PROFILES = {
    "smoke": dict(
        n_compare=20,  # proves the path
    ),
    "cpu": dict(),
    "gpu": dict(),
}
# Ours: line breaks, several blanks, Cyrillic, emoji, code, with {} for a term
FRAMES = ("The {} of it.", "see\n\n  {}, or ({}) and\t{}!", "Сегодня {} 😀 и ещё {}", "x{}x {}s my{} {}-like", "def f({}):\n    return {}  # ünï")


def compare(tokenizer, extended, chosen, texts):
    """Rows per way of adding the terms: round trips, uses that are one id, stray blanks, other words cut differently, texts that got longer."""
    ours = [frame.replace("{}", word) for word in chosen for frame in FRAMES]
    others = sorted({w for t in texts + ours for w in re.findall(r"(?<= )[^\W_]+", t)} - set(chosen))
    before = {text: task.ids_of(tokenizer, text) for text in texts + ours}
    old = {word: task.ids_of(tokenizer, f" {word}") for word in others}
    blank, table = tokenizer.convert_ids_to_tokens(task.ids_of(tokenizer, " "))[0], []
    for name, way in {"as it was": tokenizer, **vocabulary.variants(tokenizer, chosen, extended)}.items():
        ids = {text: task.ids_of(way, text) for text in before}
        inside, places = 0, 0
        for word in chosen:
            for text in (f"a {word} b", f"the {word}, and", f"of {word}.", f"{word}'s {word} x", f"(see {word})"):
                first = text.index(f" {word}")
                cut = way(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
                inside += any(start in (first, first + 1) and end == first + 1 + len(word) for start, end in cut)
                places += 1
        broken = [word for word in others if task.ids_of(way, f" {word}") != old[word]]
        stray = sum(way.convert_ids_to_tokens(new).count(blank) - tokenizer.convert_ids_to_tokens(before[text]).count(blank)
                    for text, new in ids.items())
        found = {"round_trip_share": sum(way.decode(new) == text for text, new in ids.items()) / len(ids), "one_token_share": inside / places,
                 "stray_blanks_per_text": stray / len(ids), "other_words_cut_differently": len(broken),
                 "texts_longer": sum(len(new) > len(before[text]) for text, new in ids.items()),
                 "tokens_per_text": sum(map(len, ids.values())) / len(ids)}
        sizes = {"one_token_share": places, "other_words_cut_differently": len(others)}
        table += [{"table": "ways", "model": name, "metric": k, "value": v, "n": sizes.get(k, len(ids))} for k, v in found.items()]
        table.append({"table": "ways", "model": name, "metric": "examples", "value": None, "words": broken[:4]})
    return table


def main(run):
    cfg = run.cfg
    run.load("01_data")
    terms, extended = run.artifact("01_data", "terms.json"), run.artifact("01_data", "tokenizer")
    lexicon = task.lexicon(cfg.model, terms, extended)
    words, tokenizer, added, table = [row["term"] for row in lexicon.chosen], lexicon.old, lexicon.added, []
    for word in words:
        ids = task.ids_of(tokenizer, f" {word}")
        shown = [tokenizer.decode([i]) for i in ids]
        print(f"{word!r}: {' | '.join(map(repr, shown))}  ids {ids}  ->  new id {lexicon.ids[word]}")
        table.append({"table": "spelling", "model": word, "metric": "pieces", "value": len(ids), "pieces": shown, "ids": ids,
                      "bytes": len(f" {word}".encode()), "new_id": lexicon.ids[word]})
    table += [{"table": "between", "model": entry, "metric": "id", "value": what["id"], "text": tokenizer.convert_tokens_to_string([entry])}
              for entry, what in added.items() if what["term"] is None]

    uses, texts = (results.read_rows(run.artifact("01_data", f"{name}.jsonl")) for name in ("uses", "texts"))
    step = math.ceil(len(uses + texts) / cfg.n_compare)
    table += compare(tokenizer, lexicon.new, words, [row["text"] for row in (uses + texts)[::step]])
    for row in table:
        if row["table"] == "ways" and row["metric"] in ("round_trip_share", "one_token_share"):
            run.log(way=row["model"].replace(" ", "_"), **{row["metric"]: float(row["value"])})

    model = models.load_decoder(cfg.model, models.compute_name(cfg.compute))
    size = models.size(model)
    matrix = model.get_input_embeddings().weight
    table += [{"table": "size", "model": "base", "metric": k, "value": v} for k, v in {
        "parameters": size["parameters"], "vocabulary": matrix.shape[0], "hidden": matrix.shape[1], "matrix_parameters": matrix.numel(),
        "tied": int(model.config.tie_word_embeddings), "new_rows": len(added), "new_parameters_untied": 2 * len(added) * matrix.shape[1]}.items()]
    measured = task.measure(model, tokenizer, run)
    answers = task.define(model, tokenizer, words, cfg)
    table += [row for row in task.rows_of(measured, "base") if row["metric"] != "new_token_mass"]
    for word in words:
        own = [i["term_nats"] for i, row in zip(measured["uses"], uses) if row["term"] == word]
        table.append({"table": "terms", "model": word, "metric": "term_nats", "value": sum(own) / len(own), "n": len(own)})
    table += [{"table": "definitions", "model": word, "metric": "text", "value": None, "text": text} for word, text in answers.items()]
    results.write_atomic(run.folder / "items_base.json", json.dumps({"measured": measured, "definitions": answers}, ensure_ascii=False))
    run.save(table, artifacts=["items_base.json"])
    run.log(base_bits_per_byte=next(r["value"] for r in table if (r["table"], r["metric"]) == ("uses", "bits_per_byte")), n=len(uses))


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
