"""Question: how are these words tokenized now, how should they be added, and does the model know them?

Reads   terms.json, tokenizer/ and test.jsonl of 01, under runs/<run>/task3_tokenizer/
Writes  results/<run>/task3_tokenizer/02_baseline.json, runs/<run>/task3_tokenizer/items_base.json (a score of
        each text, for the paired tests of 04)
Needs   about 30 s and 2 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import json
import re

from common import models, stats
from task3_tokenizer import task, vocabulary

# Test sentences of ours: line breaks, several spaces, Cyrillic, emoji and code, with {} for a term.
FRAMES = ("The {} of it.", "see\n\n  {}, or ({}) and\t{}!", "Сегодня {} 😀 и ещё {}", "x{}x {}s my{} {}-like",
          "def f({}):\n    return {}  # ünï")
# Around {} the term should be one token.
PLACES = ("a {} b", "the {}, and", "of {}.", "the {}'s x", "(see {})")


def compare_ways(tokenizer, extended, terms, texts):
    """Rows for each way of adding the terms: round trips, terms that are one id, other words tokenized
    differently, and length."""
    texts = texts + [frame.replace("{}", term) for term in terms for frame in FRAMES]
    others = sorted({w for text in texts for w in re.findall(r"(?<= )[^\W_]+", text)} - set(terms))
    before = {word: task.ids_of(tokenizer, f" {word}") for word in others}
    places = [(place.replace("{}", term), term) for term in terms for place in PLACES]
    table = []
    for name, way in {"as it was": tokenizer, **vocabulary.ways(tokenizer, terms, extended)}.items():
        ids = {text: task.ids_of(way, text) for text in texts}
        one = [any(way.decode([i]).strip() == term for i in task.ids_of(way, text)) for text, term in places]
        other = [task.ids_of(way, f" {word}") != before[word] for word in others]
        same = sum(way.decode(i) == text for text, i in ids.items())
        table += stats.facts("ways", name, {"round_trip_share": same / len(ids)}, n=len(ids))
        table += stats.facts("ways", name, {"one_token_share": sum(one) / len(one)}, n=len(one))
        table += stats.facts("ways", name, {"other_words_tokenized_differently": sum(other)}, n=len(other))
        mean_length = sum(map(len, ids.values())) / len(ids)
        table += stats.facts("ways", name, {"tokens_per_text": mean_length}, n=len(ids))
    return table


def main(run):
    run.load("01_data")
    cfg, lexicon = run.cfg, task.lexicon(run)
    words, tokenizer, table = list(lexicon.ids), lexicon.old, []
    for word, new_id in lexicon.ids.items():
        ids = task.ids_of(tokenizer, f" {word}")
        pieces = [tokenizer.decode([i]) for i in ids]
        print(f"{word!r}: pieces {pieces}, ids {ids} -> new id {new_id}")
        table += stats.facts("pieces", word, {"pieces": len(ids)}, ids=ids, pieces=pieces,
                             bytes=len(f" {word}".encode()), new_id=new_id)

    tests = task.test_sets(run)
    texts = [row["text"] for rows in tests.values() for row in rows]
    table += compare_ways(tokenizer, lexicon.new, words, texts)

    model = models.load_decoder(cfg.model, models.compute_name(cfg.compute))
    matrix = model.get_input_embeddings().weight
    table += stats.facts("size", "base", {
        "parameters": models.size(model)["parameters"], "vocabulary": len(matrix), "hidden": matrix.shape[1],
        "tied": int(model.config.tie_word_embeddings), "new_rows": len(lexicon.pieces_of)})
    items = task.measure(cfg, model, tokenizer, tests)
    for kind, own in items.items():
        table += task.rows_of(kind, "base", own)
    stored = {"items": items, "definitions": task.define(model, tokenizer, words, cfg)}
    results.write_atomic(run.folder / "items_base.json", json.dumps(stored))
    run.save(table, artifacts=["items_base.json"])
    bits = next(row for row in table if (row["table"], row["metric"]) == ("term windows", "bits_per_byte"))
    run.log(base_bits_per_byte=bits["value"])


if __name__ == "__main__":
    runner.start(main, task.Config, task.PROFILES)
