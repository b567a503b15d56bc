"""Task 2 without a model: metrics against worked examples and trec_eval, groups, leak gates, order of
batches."""

import random
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import pytrec_eval
import torch

from common import stats
from pipeline import results
from task2_encoder import ablations, batches, task

data, evaluation = (import_module(f"task2_encoder.{name}") for name in ("01_data", "04_eval"))
VALUE = {metric.name: metric.top for metric in task.METRICS}


# ------------------------------------------------------------------------------------------------- metrics

def item_of(ranked, relevant):
    search = task.Retrieval({"q": ""}, dict.fromkeys(ranked, ""), {"q": relevant})
    return task.evaluate(search, [{document: -place for place, document in enumerate(ranked)}])[0]


def test_metrics_of_one_query_worked_by_hand():
    """Right answers a and b, found at ranks 2 and 4."""
    item = item_of(["x", "a", "y", "b", "z"], {"a", "b"})
    assert item == {"id": "q", "ranked": ["x", "a", "y", "b", "z"], "right": 2, "ranks": [2, 4], "rank": 2}
    assert [VALUE[name](item) for name in ("mrr@10", "recall@1", "recall@5", "recall@10")] == [1 / 2, 0, 1, 1]
    best = 1 + 1 / np.log2(3)
    assert VALUE["ndcg@10"](item) == pytest.approx((1 / np.log2(3) + 1 / np.log2(5)) / best)
    assert VALUE["map@10"](item) == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_an_answer_below_ten_counts_for_nothing_but_its_rank():
    item = item_of([f"{i:02}" for i in range(20)], {"11"})
    assert item["rank"] == 12 and not any(value(item) for value in VALUE.values())
    assert item_of(["x"], {"a"})["rank"] is None


@pytest.fixture(scope="module")
def random_search():
    """40 queries, 60 documents, 1-5 right answers each, distinct random scores; (search, rankings, items)."""
    rng = random.Random(0)
    documents = {f"d{i:02}": f"text {i}" for i in range(60)}
    queries = {f"q{i}": f"query {i}" for i in range(40)}
    relevant = {query: set(rng.sample(sorted(documents), rng.randint(1, 5))) for query in queries}
    rankings = [{document: rng.random() + 0.5 * (document in relevant[query]) for document in documents}
                for query in queries]
    search = task.Retrieval(queries, documents, relevant)
    return search, rankings, task.evaluate(search, rankings)


def test_metrics_equal_trec_eval(random_search):
    search, rankings, items = random_search
    run = {query: dict(sorted(scores.items(), key=lambda pair: -pair[1])[:10])  # trec_eval has no MRR@10
           for query, scores in zip(search.queries, rankings)}
    measures = {"recall.1,5,10", "ndcg_cut.10", "recip_rank", "map_cut.10"}
    judged = {query: dict.fromkeys(right, 1) for query, right in search.relevant.items()}
    theirs = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)
    names = {"mrr@10": "recip_rank", "ndcg@10": "ndcg_cut_10", "map@10": "map_cut_10",
             **{f"recall@{k}": f"recall_{k}" for k in (1, 5, 10)}}
    assert names.keys() == VALUE.keys()
    for item in items:
        expected = {name: theirs[item["id"]][their_name] for name, their_name in names.items()}
        assert {name: VALUE[name](item) for name in names} == pytest.approx(expected, abs=1e-6)


def test_a_metric_is_added_in_one_place(random_search, monkeypatch):
    search, rankings, after = random_search
    added = stats.Metric("top3", "found among three", lambda item: (item["rank"] or 9) <= 3, better="higher",
                         binary=True)
    monkeypatch.setattr(task, "METRICS", (*task.METRICS, added))
    before = task.evaluate(search, [{document: -score for document, score in scores.items()}
                                    for scores in rankings])
    rows = evaluation.compared("pool", before, after, task.METRICS, documents=60)
    base, tuned, delta = ({row["metric"]: row for row in rows if row["name"] == name}
                          for name in ("base", "tuned", "delta"))
    assert (tuned["top3"]["label"], tuned["top3"]["documents"]) == ("found among three", 60)
    assert delta["top3"]["verdict"] == "improved" and delta["top3"]["value"] > 0.3
    assert tuned["top3"]["value"] - base["top3"]["value"] == pytest.approx(delta["top3"]["value"])


def test_nearest_documents_are_those_of_the_cosine():
    """Vectors of more texts than are searched, as the pool reads those of all documents."""
    rng = torch.Generator().manual_seed(0)
    vectors = {kind: {f"{kind[0]}{i}": torch.randn(8, generator=rng) for i in range(n)}
               for kind, n in (("query", 5), ("document", 300))}
    asked, searched = ["q3", "q1"], [f"d{i}" for i in range(0, 300, 2)]
    search = task.Retrieval(dict.fromkeys(asked, ""), dict.fromkeys(searched, ""), {})
    for query, scores in zip(asked, task.by_cosine(search, vectors)):
        one, cosine = vectors["query"][query], torch.cosine_similarity
        exact = {i: cosine(one, vectors["document"][i], dim=0).item() for i in searched}
        best = sorted(exact, key=exact.get)[-task.DEPTH:]
        assert scores == pytest.approx({document: exact[document] for document in best}, abs=1e-5)


def test_equal_scores_are_ordered_by_id_and_not_by_the_order_of_the_texts():
    """Or a corpus that lists right answers first would flatter an encoder that cannot tell texts apart."""
    search = task.Retrieval({"q": ""}, {"c": "", "a": "", "b": ""}, {"q": {"c"}})
    (item,) = task.evaluate(search, [dict.fromkeys(search.documents, 0.5)])
    assert item["ranked"] == ["a", "b", "c"] and item["rank"] == 3


def test_before_and_after_are_the_same_queries(random_search):
    _, _, items = random_search
    with pytest.raises(ValueError, match="not measured on the same items"):
        evaluation.compared("pool", items, items[1:] + items[:1], task.METRICS)


def test_rank_fusion_worked_by_hand():
    """1/61 + 1/63 for a, 1/62 + 1/61 for b, 1/63 + 1/62 for c."""
    fused = task.fuse([{"ranked": ["a", "b", "c"]}], [{"ranked": ["b", "c", "a"]}])[0]
    assert fused == pytest.approx({"a": 1 / 61 + 1 / 63, "b": 1 / 62 + 1 / 61, "c": 1 / 63 + 1 / 62})


def test_bm25_compares_stems_and_no_stop_words():
    """Plain words would answer with b, which shares "in" and "the"; only a shares stems with the query."""
    assert task.words("parse_HTTPHeader2") == ["parse", "http", "header", "2"]
    wanted = ["count", "open", "socket", "list", "sort"]
    assert task.terms("Counting the openedSockets in a list, if not sorted") == wanted
    documents = {"a": "def count_open(sockets): return len(sockets)",
                 "b": "for the in a: if the not in b: pass", "c": "def f(): pass"}
    search = task.Retrieval({"q": "Counts the opened socket in a", "none": "is it not"}, documents,
                            {"q": {"a"}, "none": {"a"}})
    items = task.evaluate(search, task.bm25(search))
    assert items[0]["rank"] == 1 and len(items[1]["ranked"]) == 3  # stop words alone are no error


def test_own_name_is_masked_everywhere_in_its_function():
    code = "def depth(n):\n    return 1 + depth(n.left) if n else in_depth"
    masked = task.masked([{"name": "m.Tree.depth", "positive": code}])[0]["positive"]
    assert masked == "def f(n):\n    return 1 + f(n.left) if n else in_depth"


def test_a_question_is_answered_by_every_document_of_the_groups_of_its_functions(tmp_path, monkeypatch):
    """m.f0 and m.f1 share a summary, m.f3 has the code of m.f2, m.gone was dropped."""
    rows = data.group(pairs_of(("Return the mean.", "def f(x): return 1"),
                               ("Return the mean.", "def g(x): return 2"),
                               ("Open a file", "def k(p): return open(p)"),
                               ("Read a file", "def k(p): return open(p)"), ("Other", "def h(x): return 3")))
    rows = [row | {"pool": i == 4} for i, row in enumerate(rows)]
    lines = [("average of numbers", ["m.f1"]), ("a file please", ["m.f3", "m.f4", "m.gone"]),
             ("no answer", ["m.gone"])]
    monkeypatch.setattr(task, "QUESTIONS", tmp_path / "questions.jsonl")
    results.write_rows(task.QUESTIONS, [{"question": text, "functions": names} for text, names in lines])
    search = task.asked(rows)
    assert search.queries == {"question1": "average of numbers", "question2": "a file please"}
    assert set(search.documents) == {"r0", "r1", "r2", "r4"}
    assert search.relevant == {"question1": {"r0", "r1"}, "question2": {"r2", "r4"}}

    assert task.searches(rows, data.Config(n_general=2))["questions"] == search
    assert "questions" not in task.searches(rows[2:], data.Config(n_general=2))  # a single one is left
    assert "questions" not in task.searches(rows, data.Config(n_general=2, data="own.csv"))


def test_questions_are_part_of_what_a_result_was_made_from():
    tracked = []
    for name in ("corpus", "own.csv"):
        task.track_questions(SimpleNamespace(cfg=data.Config(data=name), track=tracked.append))
    assert tracked == [results.ROOT / "task2_encoder" / "questions.jsonl"]


# ---------------------------------------------------------------------------------------- groups and gates

def pairs_of(*texts):
    return [{"id": f"r{i}", "anchor": anchor, "positive": positive, "split": "train", "name": f"m.f{i}",
             "package": "m"} for i, (anchor, positive) in enumerate(texts)]


@pytest.mark.parametrize("texts", [
    (("Return the mean.", "def f(x): return 1"), ("return the MEAN", "def g(x): return 2"),
     ("Another text", "def h(x): return 2"), ("Unrelated", "def k(x): return 3")),
    (("Среднее значение списка", "x = 1"), ("среднее ЗНАЧЕНИЕ списка", "y = 2"),
     ("ещё текст", "y  =  2"), ("совсем другое", "z = 3"))])
def test_equal_anchors_or_bodies_are_one_group_also_through_others(texts):
    groups = [row["group"] for row in data.group(pairs_of(*texts))]
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_every_document_of_a_group_is_a_right_answer_and_equal_texts_are_one():
    rows = data.group(pairs_of(("Return the mean.", "def f(x): return 1"),
                               ("Return the mean.", "def g(x): return 2"), ("Other", "def g2(x): return 2")))
    search = task.retrieval(rows)
    assert set(search.documents) == {"r0", "r1"} and set(search.queries) == {"r0", "r2"}
    assert search.relevant == {"r0": {"r0", "r1"}, "r2": {"r0", "r1"}}


BODY = "def f(items):\n" + "\n".join(f"    total_{i} = sum(value * {i} for value in items if value > {i})"
                                     for i in range(20))


def test_cleaning_keeps_the_held_out_copy_of_everything_that_would_leak():
    rows = [dict(zip(("id", "split", "anchor", "positive"), values)) for values in (
        ("a", "train", "Sum the values many times", BODY),
        ("b", "test", "Total of all values, often", BODY.replace("total_7", "result_7")),  # nearly a
        ("c", "train", "Open a file", "def g(p): return open(p)"),
        ("d", "test", "open A file.", "def g(p, q): return open(p, q)"),  # the anchor of c
        ("e", "train", "print a greeting", "def h(): print('Print a greeting!')"),  # holds its anchor
        ("f", "train", "The same text.", "the same text"),
        ("g", "test", "open a FILE", "def g2(p, q): return open(p, q)"),  # repeats d
        ("h", "train", "open a file", "def g(p, q): return open(p, q)"))]  # repeats d
    kept, counts = data.clean(rows)
    assert {row["id"] for row in kept} == {"b", "d"}
    assert counts == {"pairs": 8, "repeated_pair": 2, "anchor_in_positive": 2, "group_in_earlier_split": 1,
                      "near_duplicate": 1, "kept": 2, "groups": 2}


@pytest.mark.parametrize(("planted", "kind"), [
    ({"anchor": "return THE mean of all", "positive": "def q(z): return z"}, "same_summary"),
    ({"anchor": "Quite another text", "positive": "def other(x): return sum(x) / len(x)"}, "same_body"),
    ({"anchor": "Quite another text", "positive": BODY.replace("total_3", "thing_3")}, "near_duplicate"),
    ({"anchor": "Quite another text", "positive": "def q(z): return z", "group": "r0"}, "same_group")])
def test_planted_leaks_fire(planted, kind):
    train = data.group(pairs_of(("Return the mean of all", "def mean(x): return sum(x) / len(x)"),
                                ("Sum the values", BODY)))
    leaked = data.leaks(train, [{"id": "t", "group": "t", **planted}])
    assert leaked[kind] == 1
    with pytest.raises(SystemExit, match="shares rows"):
        data.refuse_leaks(leaked, 0.5)


def test_the_gate_of_word_search_fires():
    data.refuse_leaks({"same_summary": 0}, 0.95)
    with pytest.raises(SystemExit, match=r"BM25 alone reaches MRR@10 0\.990"):
        data.refuse_leaks({"same_summary": 0}, 0.99)


def test_a_docstring_left_in_the_code_makes_bm25_find_everything():
    """The gate's own reason: with the anchor inside, word search is perfect; without it, it is not."""
    anchors = [f"{verb} the {part} of {whole}" for verb in ("load", "save", "count")
               for part in ("rows", "names") for whole in ("tree", "list")]

    def bm25_mrr(positives):
        search = task.retrieval(data.group(pairs_of(*zip(anchors, positives))))
        return task.mean_mrr(task.evaluate(search, task.bm25(search)))

    left = bm25_mrr(f'def f(x):\n    """{anchor}"""\n    return x' for anchor in anchors)
    taken = bm25_mrr(f"def f(x):\n    return {anchor.split()[-1]}_{i}" for i, anchor in enumerate(anchors))
    assert left > 0.95 > taken


def test_whole_groups_are_taken():
    rows = data.group(pairs_of(*((f"anchor number {i // 3}", f"def f(x): return {i}") for i in range(30))))
    taken, others = data.take(rows, 10, seed=0)
    assert len(taken) == 9 and len(others) == 21
    assert not {row["group"] for row in taken} & {row["group"] for row in others}


GOOD = [(f"good anchor {i}", f"some positive text {i * 7919}") for i in range(120)]


@pytest.mark.parametrize(("pairs", "words"), [
    ((*GOOD, ("an anchor", " ")), ["row 121", "'positive'"]),
    (GOOD[:50], ["50 rows", "at least 112", "n_pool=.. n_dev=.."])])
def test_bad_pairs_are_reported_in_one_line(tmp_path, pairs, words):
    (tmp_path / "bad.csv").write_text("\n".join(f'"{a}","{p}"' for a, p in [("anchor", "positive"), *pairs]))
    with pytest.raises(SystemExit) as error:
        data.own_rows(data.Config(data=str(tmp_path / "bad.csv"), n_pool=24, n_dev=24))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- topics

def test_topics_are_subpackages_with_enough_documents_in_enough_modules():
    names = ["p.big.f"] * 30 + ["p.small.f"] * 29 + ["p.narrow.f"] * 30 + ["p.top"] * 2
    rows = data.group([{"id": f"r{i}", "anchor": f"anchor {i}", "positive": f"def f(x): return {i}",
                        "name": name, "module": f"p.m{i % (4 if 'narrow' in name else 5)}"}
                       for i, name in enumerate(names)])
    topics = {row["id"]: row["topic"] for row in task.topics(rows)}
    assert topics == {f"r{i}": "p.big" for i in range(30)}


def probed(vectors, topics, modules):
    members = [{"id": i, "topic": topic, "module": module}
               for i, (topic, module) in enumerate(zip(topics, modules))]
    items = task.probe_topics(dict(enumerate(torch.tensor(vectors))), members, seed=0)
    return np.mean([item["correct"] for item in items])


def test_the_topic_probe_sees_no_module_on_both_sides_of_a_fold():
    """Vectors that say the module and nothing more: who has seen a module knows its topic, others do not."""
    modules = [i // 12 for i in range(12 * 12)]
    assert probed(np.eye(12)[modules], ["ab"[module % 2] for module in modules], modules) <= 0.5


def test_every_topic_is_known_in_every_fold():
    rng = np.random.default_rng(0)
    topics = [i % 3 for i in range(150)]
    vectors = rng.normal(size=(3, 8))[topics] + 0.1 * rng.normal(size=(150, 8))
    assert probed(vectors, topics, [f"{topic}.m{i // 3 % 5}" for i, topic in enumerate(topics)]) == 1


# ------------------------------------------------------------------------------------------------- batches

def knobs(**changes):
    own = dict(max_steps=30, batch_size=8, bucket=25, within_package=False, seed=0)
    return SimpleNamespace(**own | changes)


def test_no_group_stands_twice_in_a_batch_and_batches_are_alike_in_length():
    """30 of 200 rows share one group: a plain shuffle would put two of them together in nearly every
    batch."""
    rng = random.Random(0)
    lengths = [(rng.randint(5, 40), rng.randint(10, 128)) for _ in range(200)]
    rows = [{"id": i, "group": "big" if i < 30 else f"g{i}", "package": "ab"[i % 2],
             "anchor": f"anchor {i}"} for i in range(200)]
    order = batches.schedule(rows, lengths, knobs())
    assert len(order) == 30
    assert all(len({rows[i]["group"] for i in batch}) == len(batch) == 8 for batch in order)

    def padded(some):
        return sum(8 * max(lengths[i][1] for i in batch) for batch in some) / sum(
            lengths[i][1] for batch in some for i in batch)

    assert padded(order) < 0.85 * padded([rng.sample(range(200), 8) for _ in range(30)])
    first = [i for batch in order[:16] for i in batch]
    assert len(first) == len(set(first))  # within an epoch no row comes twice
    assert order == batches.schedule(rows, lengths, knobs()) != batches.schedule(rows, lengths, knobs(seed=1))

    def mixed(within_package):
        again = batches.schedule(rows, lengths, knobs(within_package=within_package))
        return sum(len({rows[i]["package"] for i in batch}) > 1 for batch in again)

    assert mixed(False) > 25 and mixed(True) < 8  # only where two packages meet in a span


def test_too_few_groups_for_a_batch_is_an_error():
    rows = [{"id": i, "group": i % 4, "package": "p", "anchor": str(i)} for i in range(40)]
    with pytest.raises(SystemExit, match=r"no 8 of 40 rows .* different groups: lower SET=batch_size"):
        batches.schedule(rows, [(1, 1)] * 40, knobs())


def test_shuffled_pairs_keep_the_texts_of_each_package_and_break_the_pairs():
    rows = [row | {"package": "ab"[i % 2], "group": "g"}
            for i, row in enumerate(pairs_of(*((f"a{i}", f"p{i}") for i in range(50))))]
    mixed = ablations.shuffled(rows, 0)
    assert [row["anchor"] for row in mixed] == [row["anchor"] for row in rows]
    assert len({row["group"] for row in mixed}) == 50
    for package in "ab":
        before, after = (sorted(row["positive"] for row in some if row["package"] == package)
                         for some in (rows, mixed))
        assert before == after
    assert sum(one["positive"] == other["positive"] for one, other in zip(rows, mixed)) < 5
