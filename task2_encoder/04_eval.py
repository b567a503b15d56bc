"""Question: is search better, is it the weights that did it, and what did it cost elsewhere?

Same queries, same functions, same batch size as 02, in a fresh process that loads the adapter from disk.

Reads   items_base.json and vectors_base.safetensors of 02, adapter/ and merged/ of 03
Writes  results/<run>/task2_encoder/04_eval.json, runs/<run>/task2_encoder/{items_tuned.json,examples.md}
Needs   about 2.5 min and 2 GB on 2 cores
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's modules, not another's

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import json
from dataclasses import dataclass

from common import models  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from common import stats
from task2_encoder import task, training


@dataclass(frozen=True)
class Config(task.Config):
    # Queries of the lists "most improved" and "most harmed".
    n_extremes: int = 10
    # Documents on each embedding map: more would only hide each other.
    n_map: int = 400


PROFILES = {
    "smoke": dict(
        n_extremes=2,  # enough for every code path
        n_map=40,  # same
    ),
    "cpu": dict(),
    "gpu": dict(),
}
HEADLINE = ("mrr@10", "ndcg@10", "recall@1", "recall@10")


def reloaded(run, asked, adapter):
    """{model: vectors of the pool} of what others open from disk: the adapter on the fp32 base with plain
    PEFT, the merged model with plain sentence-transformers."""
    cfg, folder = run.cfg, run.artifact("03_train", "merged")
    fp32 = {"dtype": torch.float32}  # however it is stored
    merged = SentenceTransformer(str(folder), device=str(models.device()), model_kwargs=fp32)
    opened = {"fp32 + adapter": training.with_peft(adapter, cfg), "merged fp32": merged}
    read = [model.max_seq_length for model in opened.values()]
    if read[0] != read[1]:
        raise SystemExit(f"{results.shown(folder)} reads {read[1]} tokens, it was trained with {read[0]}")
    return {name: task.embed_task(model, asked, cfg.eval_batch_size) for name, model in opened.items()}


def largest_difference(a, b):
    return max(float((a[kind][i] - b[kind][i]).abs().max()) for kind in a for i in a[kind])


def extremes(before, after, rows, k):
    """The k queries whose reciprocal rank rose and fell most, ties broken by rank, then id. Names and ranks only."""
    names = {row["id"]: row["name"] for row in rows}
    ranks = [(b["rank"] or task.DEPTH + 1, a["rank"] or task.DEPTH + 1) for b, a in zip(before, after)]
    order = sorted(range(len(ranks)), key=lambda i: (1 / ranks[i][1] - 1 / ranks[i][0], ranks[i][0] - ranks[i][1], before[i]["id"]))
    return [{"table": "examples", "model": kind, "metric": "rank", "item": names[before[i]["id"]], "id": before[i]["id"],
             "before": before[i]["rank"], "value": after[i]["rank"],
             "first_before": names[before[i]["ranked"][0]], "first_after": names[after[i]["ranked"][0]]}
            for kind, chosen in (("most improved", order[::-1][:k]), ("most harmed", order[:k])) for i in chosen]


def write_examples(run, examples, rows):
    """Full texts, for the reader's own machine only: they quote the installed packages."""
    by_id, text = {row["id"]: row for row in rows}, ["# The most improved and most harmed queries in full\n"]
    for e in examples:
        row = by_id[e["id"]]
        text.append(f"## {e['model']}: {row['name']} (rank {e['before']} -> {e['value']})\n\n> {row['anchor']}\n\n"
                    f"```python\n{row['positive']}\n```\n\n- first before: {e['first_before']}\n- first after: {e['first_after']}\n")
    results.write_atomic(run.folder / "examples.md", "\n".join(text))


def maps(base, tuned, rows, cfg):
    """t-SNE (van der Maaten & Hinton 2008) of the same documents before and after, with their topics: a picture, not evidence."""
    from sklearn.manifold import TSNE
    topic = task.topics(rows)
    largest = sorted(set(topic.values()), key=lambda t: (-sum(v == t for v in topic.values()), t))[:8]
    chosen = [i for i in topic if topic[i] in largest][:cfg.n_map]
    out = []
    for name, vectors in (("base", base), ("tuned", tuned)):
        stacked = torch.stack([vectors[i] for i in chosen]).numpy()
        xy = TSNE(2, init="pca", perplexity=min(30, len(chosen) // 4), random_state=cfg.seed).fit_transform(stacked)
        out.append({"table": "map", "model": name, "metric": "tsne", "x": [round(float(v), 2) for v in xy[:, 0]],
                    "y": [round(float(v), 2) for v in xy[:, 1]], "label": [topic[i] for i in chosen]})
    return out


def main(run):
    cfg = run.cfg
    for step in ("01_data", "02_baseline", "03_train"):
        run.load(step)
    test = results.read_rows(run.artifact("01_data", "test.jsonl"))
    stored = json.loads(run.artifact("02_baseline", "items_base.json").read_text())
    base, tuned = (f"{models.label(cfg.precision)} {what}" for what in ("base", "+ adapter"))
    before, adapter = stored[base], run.artifact("03_train", "adapter")
    model = training.load_adapter(adapter, cfg)
    after, vectors = task.measure(model, run, test)
    asked = task.pool(test)
    del model

    rows = task.rows_of(before, "base", test, cfg.n_general) + task.rows_of(after, "tuned", test, cfg.n_general)
    for name in ("pool", "full", "masked", "general"):
        if name in after:
            rows += task.delta_rows(name, before[name], after[name])
    rows = [row | {"table": "headline"} for metric in HEADLINE for row in rows if (row["table"], row["metric"]) == ("pool", metric)] + rows
    for name, members in task.slices(test).items():
        old, new = ([item for item in items["pool"] if item["id"] in members] for items in (before, after))
        for which, items in (("base", old), ("tuned", new)):
            rows += task.metric_rows(f"slice: {name}", which, items, len(asked.documents), ("mrr@10",))
        rows += task.delta_rows(f"slice: {name}", old, new, ("mrr@10",))
    if "downstream" in after:
        old, new = before["downstream"], after["downstream"]
        delta = stats.mcnemar(old["correct"], new["correct"])
        rows += [{"table": "downstream", "model": "delta", "metric": "accuracy", **delta, "verdict": stats.verdict(delta, True)}]
        rows += [{"table": "downstream", "model": "majority", "metric": "accuracy", "value": old["majority"],
                  "n": len(old["correct"])}]
        rows += maps(load_file(run.artifact("02_baseline", "vectors_base.safetensors")), vectors["document"], test, cfg)

    systems = {name: stored[name]["pool"] for name in ("random", "BM25", "fp32 base", base)}
    systems[tuned] = after["pool"]
    opened = reloaded(run, asked, adapter)
    systems |= {name: task.evaluate(asked, found) for name, found in opened.items()}
    for name in (base, tuned):
        systems[f"RRF of BM25 and {name}"] = task.evaluate(asked, hits=task.fuse(systems["BM25"], systems[name]))
    for name, items in systems.items():
        rows += task.metric_rows("systems", name, items, len(asked.documents))
        rows += task.delta_rows("systems minus fp32 base", systems["fp32 base"], items, ("mrr@10",), model=name)
    parity = {"merged fp32 against fp32 + adapter": largest_difference(opened["merged fp32"], opened["fp32 + adapter"]),
              f"{tuned} against fp32 + adapter": largest_difference(opened["fp32 + adapter"], vectors)}
    if parity["merged fp32 against fp32 + adapter"] > 1e-5:
        raise SystemExit(f"{results.shown(run.folder / 'merged')} is not base + adapter: embeddings differ by {parity}")
    rows += [{"table": "parity", "model": name, "metric": "largest embedding difference", "value": value} for name, value in parity.items()]

    examples = extremes(before["pool"], after["pool"], test, cfg.n_extremes)
    write_examples(run, examples, test)
    results.write_atomic(run.folder / "items_tuned.json", json.dumps(after))
    run.save(rows + examples, artifacts=["items_tuned.json", "examples.md"])
    head = next(r for r in rows if r["table"] == "headline" and r["model"] == "delta")
    run.log(delta_mrr=head["value"], lo=head["lo"], hi=head["hi"], p=head["p"], n=head["n"], verdict=head["verdict"])


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
