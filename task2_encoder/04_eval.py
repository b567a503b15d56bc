"""Question: is search better, is it the weights that did it, and what did it cost elsewhere?

Same queries, same functions, same batch size as 02, in a fresh process that loads the adapter from disk.

Reads   items_base.json of 02, adapter/ and merged/ of 03, task2_encoder/questions.jsonl
Writes  results/<run>/task2_encoder/04_eval.json, runs/<run>/task2_encoder/{items_tuned.json,examples.md}
Needs   about 3 min and 2.5 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import json
from collections import Counter
from itertools import chain

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from common import models, stats
from pipeline import card
from sources import corpus
from task2_encoder import task

EXTREMES = 10  # queries of the lists "most improved" and "most harmed"


def compared(table: str, before: list, after: list, metrics, **more) -> list:
    """Result rows of the difference, of the base and of the tuned encoder."""
    rows = stats.delta_rows(table, "delta", before, after, metrics)
    for name, items in (("base", before), ("tuned", after)):
        rows += stats.rows_of(table, name, items, metrics, **more)
    return rows


def slices(rows: list, queries: dict) -> dict[str, set]:
    """{"slice: " + name: query ids} of the pool: by length of the query (thirds, in words) and by package."""
    packages = {row["id"]: row["package"] for row in rows}
    lengths = {query: len(text.split()) for query, text in queries.items()}
    low, high = np.quantile(list(lengths.values()), [1 / 3, 2 / 3]).astype(int).tolist()
    thirds = (f"query up to {low} words", f"query of {low + 1}-{high} words", f"query above {high} words")
    members = {name: set() for name in thirds}
    for query, length in lengths.items():
        members[thirds[(length > low) + (length > high)]].add(query)
        members.setdefault(f"package {packages[query]}", set()).add(query)
    return {f"slice: {name}": own for name, own in members.items() if len(own) >= 2}


def extremes(before: list, after: list, rows: list) -> list:
    """The queries whose reciprocal rank rose and fell most, as result rows with names and ranks only.

    Ties are broken by rank, then by id. A rank below task.DEPTH is None.
    """
    names = {row["id"]: row["name"] for row in rows}

    def change(pair):
        old, new = (item["rank"] or task.DEPTH + 1 for item in pair)
        return 1 / new - 1 / old, old - new, pair[0]["id"]

    order = sorted(zip(before, after), key=change)
    return [{"table": "examples", "name": kind, "metric": "rank", "value": new["rank"],
             "before": old["rank"], "id": old["id"], "item": names[old["id"]],
             "first_before": names[old["ranked"][0]], "first_after": names[new["ranked"][0]]}
            for kind, pairs in (("most improved", order[::-1][:EXTREMES]), ("most harmed", order[:EXTREMES]))
            for old, new in pairs]


def examples_text(examples: list, rows: list) -> str:
    """Full texts, for the reader's own machine only: they quote the installed packages."""
    by_id, text = {row["id"]: row for row in rows}, ["# The most improved and most harmed queries in full\n"]
    for example in examples:
        row = by_id[example["id"]]
        ranks = f"rank {example['before']} -> {example['value']}"
        text.append(f"## {example['name']}: {row['name']} ({ranks})\n\n"
                    f"> {row['anchor']}\n\n```python\n{row['positive']}\n```\n\n"
                    f"- first before: {example['first_before']}\n- first after: {example['first_after']}\n")
    return "\n".join(text)


def main(run):
    cfg = run.cfg
    _, _, trained = (run.load(step) for step in ("01_data", "02_baseline", "03_train"))
    test = run.rows("test")
    stored = json.loads(run.artifact("02_baseline", "items_base.json").read_text())
    adapter, merged = (run.artifact("03_train", name) for name in ("adapter", "merged"))
    base, tuned = (f"{models.label(cfg.precision)} {what}" for what in ("base", "+ adapter"))
    task.track_questions(run)
    searches, before = task.searches(test, cfg), stored[base]
    after, vectors = task.measure(task.load_adapter(adapter, cfg), searches, cfg, test)
    stats.refuse_unchanged(before, after)

    # the headline: against the base in full precision, which 4 bits have not hurt
    rows, by_id = [], {row["id"]: row for row in test}
    clusters = {"pool": corpus.subpackages([by_id[query] for query in searches["pool"].queries])}
    for name in [name for name in ("pool", "questions") if name in after]:
        rows += stats.delta_rows("headline", "tuned minus fp32 base", stored["fp32 base"][name], after[name],
                                 [task.MRR], clusters=clusters.get(name), kind=name)

    # before and after, on every search, as features for topics, and on slices of the pool
    tables = {name: compared(name, before[name], after[name], task.METRICS, documents=len(search.documents))
              for name, search in searches.items()}
    rows += chain(*tables.values())
    if "downstream" in after:
        rows += compared("downstream", before["downstream"], after["downstream"], task.ACCURACY)
        n, sizes = len(after["downstream"]), Counter(item["topic"] for item in after["downstream"])
        rows += stats.facts("downstream", "majority", {"accuracy": max(sizes.values()) / n}, n=n)
    pool = searches["pool"]
    for name, members in slices(test, pool.queries).items():
        old, new = ([item for item in items["pool"] if item["id"] in members] for items in (before, after))
        rows += compared(name, old, new, [task.MRR], documents=len(pool.documents))

    # what was saved, as others open it: the adapter on the fp32 base, the merged model with the plain library
    fp32 = {"dtype": torch.float32}  # however it is stored
    plain = SentenceTransformer(str(merged), device=str(models.device()), model_kwargs=fp32)
    opened = {"fp32 + adapter": task.load_adapter(adapter, cfg, "fp32"), "merged fp32": plain}
    opened = {name: task.embed(model, pool, cfg.eval_batch_size) for name, model in opened.items()}
    parity = {f"{name} against fp32 + adapter": task.largest_difference(opened["fp32 + adapter"], other)
              for name, other in (("merged fp32", opened["merged fp32"]), (tuned, vectors))}
    assert parity["merged fp32 against fp32 + adapter"] < 1e-5, f"merged/ is not base + adapter: {parity}"
    for name, value in parity.items():
        rows += stats.facts("parity", name, {"largest embedding difference": value})

    # all systems side by side, with BM25 and its fusion with each encoder
    systems = {name: stored[name]["pool"] for name in ("random", "BM25", "fp32 base", base)}
    systems[tuned] = after["pool"]
    systems |= {name: task.evaluate(pool, task.by_cosine(pool, found)) for name, found in opened.items()}
    for name in (base, tuned):
        systems[f"RRF of BM25 and {name}"] = task.evaluate(pool, task.fuse(systems["BM25"], systems[name]))
    for name, items in systems.items():
        rows += stats.rows_of("systems", name, items, task.METRICS)
        rows += stats.delta_rows("systems minus fp32 base", name, systems["fp32 base"], items, [task.MRR])

    examples = extremes(before["pool"], after["pool"], test)
    results.write_atomic(run.folder / "examples.md", examples_text(examples, test))
    results.write_atomic(run.folder / "items_tuned.json", json.dumps(after))
    stats.holm(rows)
    card.write(run, trained, rows, "adapter", "merged")
    run.save(rows + examples, artifacts=["items_tuned.json", "examples.md"])
    mrr = tables["pool"][0]
    run.log(delta_mrr=mrr["value"], **{key: mrr[key] for key in ("lo", "hi", "p", "n", "verdict")})


if __name__ == "__main__":
    runner.start(main, task.Config, task.PROFILES)
