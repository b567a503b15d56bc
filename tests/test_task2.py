"""Task 2: metrics against worked examples and trec_eval, groups, gates, batches, and what training leaves intact."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import pytrec_eval
import torch

from common import models, trainer
from task2_encoder import ablations, pairs, task, training

# ---------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_one_query_worked_by_hand():
    """Right answers a and b, found at ranks 2 and 4."""
    got = task.query_metrics(["x", "a", "y", "b", "z"], {"a", "b"})
    assert got["rank"] == 2 and got["mrr@10"] == 1 / 2
    assert (got["recall@1"], got["recall@5"], got["recall@10"]) == (0, 1, 1)
    assert got["ndcg@10"] == pytest.approx((1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3)))
    assert got["map@10"] == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_an_answer_below_ten_counts_for_nothing_but_its_rank():
    got = task.query_metrics([str(i) for i in range(20)], {"11"})
    assert got["rank"] == 12 and not any(got[m] for m in task.METRICS)
    assert task.query_metrics(["x"], {"a"})["rank"] is None


@pytest.fixture(scope="module")
def random_search():
    """40 queries, 60 documents, 1-5 right answers each, distinct random scores."""
    rng = random.Random(0)
    documents = {f"d{i:02}": f"text {i}" for i in range(60)}
    queries = {f"q{i}": f"query {i}" for i in range(40)}
    relevant = {q: set(rng.sample(sorted(documents), rng.randint(1, 5))) for q in queries}
    hits = [[{"corpus_id": d, "score": rng.random() + (d in relevant[q]) * 0.5} for d in documents] for q in queries]
    return task.Retrieval(queries, documents, relevant), hits


def test_metrics_equal_trec_eval(random_search):
    asked, hits = random_search
    ours = {item["id"]: item for item in task.evaluate(asked, hits=hits)}  # which itself compares with sentence-transformers
    best = {q: sorted(row, key=lambda h: -h["score"])[:10] for q, row in zip(asked.queries, hits)}  # trec_eval has no MRR@10
    run = {q: {h["corpus_id"]: h["score"] for h in row} for q, row in best.items()}
    measures = {"recall.1,5,10", "ndcg_cut.10", "recip_rank", "map_cut.10"}
    theirs = pytrec_eval.RelevanceEvaluator({q: dict.fromkeys(r, 1) for q, r in asked.relevant.items()}, measures).evaluate(run)
    names = dict(zip(task.METRICS, ("recall_1", "recall_5", "recall_10", "recip_rank", "ndcg_cut_10", "map_cut_10")))
    for q in asked.queries:
        assert {m: ours[q][m] for m in names} == pytest.approx({m: theirs[q][name] for m, name in names.items()}, abs=1e-6)


def test_rank_fusion_worked_by_hand():
    """1/61 + 1/63 for a, 1/62 + 1/61 for b, 1/63 + 1/62 for c."""
    fused = task.fuse([{"ranked": ["a", "b", "c"]}], [{"ranked": ["b", "c", "a"]}])[0]
    assert {h["corpus_id"]: h["score"] for h in fused} == pytest.approx({"a": 1 / 61 + 1 / 63, "b": 1 / 62 + 1 / 61, "c": 1 / 63 + 1 / 62})


def test_bm25_finds_the_document_with_the_rare_word_and_splits_identifiers():
    documents = {"a": "def openSockets(x): return 1", "b": "def count_lines(path): return 2", "c": "def f(): pass"}
    asked = task.Retrieval({"q": "count open sockets"}, documents, {"q": {"a"}})
    assert task.evaluate(asked, hits=task.bm25(asked))[0]["rank"] == 1
    assert task.words("parse_HTTPHeader2") == ["parse", "http", "header", "2"]


def test_bm25_compares_stems_and_no_stop_words():
    """Plain words would answer with b, which shares "in" and "the"; only a shares stems with the query."""
    found = task.terms("Counting the openedSockets in a list, if not sorted")
    assert found == ["count", "open", "socket", "list", "sort"]
    documents = {"a": "def count_open(sockets): return len(sockets)",
                 "b": "for the in a: if the not in b: pass", "c": "def f(): pass"}
    asked = task.Retrieval({"q": "Counts the opened socket in a"}, documents, {"q": {"a"}})
    item = task.evaluate(asked, hits=task.bm25(asked))[0]
    assert item["rank"] == 1
    nothing = task.Retrieval({"q": "is it not"}, documents, {"q": {"a"}})  # stop words alone: no error
    assert len(task.evaluate(nothing, hits=task.bm25(nothing))[0]["ranked"]) == 3


def test_own_name_is_masked_everywhere_in_its_function():
    row = {"name": "m.Tree.depth", "positive": "def depth(n):\n    return 1 + depth(n.left) if n else in_depth"}
    assert task.masked([row])[0]["positive"] == "def f(n):\n    return 1 + f(n.left) if n else in_depth"


# ---------------------------------------------------------------------------------------------------------------- groups and gates

def rows_of(*texts, split="train"):
    return [{"id": f"r{i}", "anchor": a, "positive": p, "split": split, "name": f"m.f{i}", "package": "m"} for i, (a, p) in enumerate(texts)]


def test_equal_anchors_or_bodies_are_one_group_also_through_others():
    rows = pairs.group(rows_of(("Return the mean.", "def f(x): return 1"), ("return the MEAN", "def g(x): return 2"),
                               ("Another text", "def h(x): return 2"), ("Unrelated", "def k(x): return 3")))
    assert rows[0]["group"] == rows[1]["group"] == rows[2]["group"] != rows[3]["group"]


def test_every_document_of_a_group_is_a_right_answer_and_equal_texts_are_one():
    rows = pairs.group(rows_of(("Return the mean.", "def f(x): return 1"), ("Return the mean.", "def g(x): return 2"),
                               ("Other", "def g2(x): return 2")))
    asked = task.retrieval(rows)
    assert set(asked.documents) == {"r0", "r1"} and set(asked.queries) == {"r0", "r2"}
    assert asked.relevant == {"r0": {"r0", "r1"}, "r2": {"r0", "r1"}}


BODY = "def f(items):\n" + "\n".join(f"    total_{i} = sum(value * {i} for value in items if value > {i})" for i in range(20))


def test_cleaning_keeps_the_held_out_copy_of_everything_that_would_leak():
    rows = [{"id": "a", "anchor": "Sum the values many times", "positive": BODY, "split": "train"},
            {"id": "b", "anchor": "Total of all values, often", "positive": BODY.replace("total_7", "result_7"), "split": "test"},  # near-duplicate
            {"id": "c", "anchor": "Open a file", "positive": "def g(p): return open(p)", "split": "train"},
            {"id": "d", "anchor": "open A file.", "positive": "def g(p, q): return open(p, q)", "split": "test"},  # same anchor
            {"id": "e", "anchor": "print a greeting", "positive": "def h(): print('Print a greeting!')", "split": "train"},  # tells its anchor
            {"id": "g", "anchor": "open a FILE", "positive": "def g2(p, q): return open(p, q)", "split": "test"},  # repeats d
            {"id": "h", "anchor": "open a file", "positive": "def g(p, q): return open(p, q)", "split": "train"}]  # repeats d after c
    kept, counts = pairs.clean(rows)
    assert {r["id"] for r in kept} == {"b", "d"}
    assert [counts[k] for k in ("near_duplicate", "group_in_earlier_split", "anchor_in_positive", "repeated_pair", "kept")] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(("planted", "kind"), [
    ({"anchor": "return THE mean of all", "positive": "def q(z): return z"}, "same_summary"),
    ({"anchor": "Quite another text", "positive": "def other(x): return sum(x) / len(x)"}, "same_body"),
    ({"anchor": "Quite another text", "positive": BODY.replace("total_3", "thing_3")}, "near_duplicate")])
def test_planted_leaks_fire(planted, kind):
    train = pairs.group(rows_of(("Return the mean of all", "def mean(x): return sum(x) / len(x)"), ("Sum the values", BODY)))
    found = pairs.leaks(train, [{"id": "t", "group": "t", **planted}])
    assert found[kind] == 1
    with pytest.raises(SystemExit, match="shares rows"):
        pairs.refuse_leaks(found, 0, 0.5)


def test_the_other_gates_fire():
    clean = {"same_summary": 0}
    pairs.refuse_leaks(clean, 0, 0.95)
    with pytest.raises(SystemExit, match="docstring left"):
        pairs.refuse_leaks(clean, 1, 0.5)
    with pytest.raises(SystemExit, match=r"BM25 alone reaches MRR@10 0\.990"):
        pairs.refuse_leaks(clean, 0, 0.99)


def test_a_docstring_left_in_the_code_makes_bm25_find_everything():
    """The gate's own reason: with the anchor inside, word search is perfect; without it, it is not."""
    anchors = [f"{a} the {b} of {c}" for a in ("load", "save", "count") for b in ("rows", "names") for c in ("tree", "list")]

    def lexical(positives):
        asked = task.retrieval(pairs.group(rows_of(*zip(anchors, positives))))
        return task.mean(task.evaluate(asked, hits=task.bm25(asked)), "mrr@10")
    left = lexical(f'def f(x):\n    """{a}"""\n    return x' for a in anchors)
    taken = lexical(f"def f(x):\n    return {a.rsplit(' ', 1)[-1]}_{i}" for i, a in enumerate(anchors))
    assert left > 0.95 > taken


def test_topics_are_subpackages_with_enough_documents_in_enough_modules():
    names = ["p.big.f"] * 30 + ["p.small.f"] * 29 + ["p.narrow.f"] * 30 + ["p.top"] * 2
    rows = [{"id": f"r{i}", "anchor": f"anchor {i}", "positive": f"def f(x): return {i}", "name": name,
             "module": f"p.m{i % (4 if 'narrow' in name else 5)}"} for i, name in enumerate(names)]
    rows = pairs.group(rows)
    assert task.topics(rows) == {f"r{i}": "p.big" for i in range(30)}


def test_the_topic_probe_sees_no_module_on_both_sides_of_a_fold():
    """Vectors that say the module and nothing more: who has seen a module knows its topic, others do not."""
    modules = [f"m{i // 12:02}" for i in range(12 * 12)]
    labels = ["ab"[int(module[1:]) % 2] for module in modules]
    vectors = np.eye(12)[[int(module[1:]) for module in modules]]
    got = task.downstream(vectors, labels, modules, seed=0)
    assert np.mean(got["correct"]) <= 0.5 == got["majority"]


def test_every_topic_is_known_in_every_fold():
    rng = np.random.default_rng(0)
    labels = [f"t{i % 3}" for i in range(150)]
    modules = [f"{label}.m{i // 3 % 5}" for i, label in enumerate(labels)]
    centres = rng.normal(size=(3, 8))
    vectors = np.stack([centres[int(label[1])] for label in labels]) + 0.1 * rng.normal(size=(150, 8))
    assert np.mean(task.downstream(vectors, labels, modules, seed=0)["correct"]) == 1


def test_texts_of_other_scripts_are_compared_too():
    rows = pairs.group(rows_of(("Среднее значение списка", "x = 1"), ("среднее ЗНАЧЕНИЕ списка", "y = 2"), ("совсем другое", "z = 3")))
    assert rows[0]["group"] == rows[1]["group"] != rows[2]["group"]


def test_whole_groups_are_taken():
    rows = pairs.group(rows_of(*((f"anchor number {i // 3}", f"def f(x): return {i}") for i in range(30))))
    taken, others = pairs.take(rows, 10, seed=0)
    assert len(taken) == 9 and not {r["group"] for r in taken} & {r["group"] for r in others} and len(taken) + len(others) == 30


# ---------------------------------------------------------------------------------------------------------------- batches

def test_no_group_stands_twice_in_a_batch_and_batches_are_alike_in_length():
    """30 of 200 rows share one group, so a plain shuffle would put two of them together in nearly every batch."""
    rng = random.Random(0)
    rows = [{"group": "big" if i < 30 else f"g{i}", "lengths": (rng.randint(5, 40), rng.randint(10, 128)),
             "package": "ab"[i % 2]} for i in range(200)]
    batches = training.schedule(rows, max_steps=30, batch_size=8, bucket=25, same_package=False, seed=0)
    assert len(batches) == 30 and {len(b) for b in batches} == {8}
    assert all(len({rows[i]["group"] for i in b}) == 8 for b in batches)

    def padded(some):
        return sum(8 * max(rows[i]["lengths"][1] for i in b) for b in some) / sum(rows[i]["lengths"][1] for b in some for i in b)
    assert padded(batches) < 0.85 * padded([rng.sample(range(200), 8) for _ in range(30)])
    first = [i for b in batches[:16] for i in b]
    assert len(first) == len(set(first))  # within an epoch no row comes twice
    assert batches == training.schedule(rows, 30, 8, 25, False, 0) != training.schedule(rows, 30, 8, 25, False, 1)
    mixed, same = ([len({rows[i]["package"] for i in b}) - 1 for b in training.schedule(rows, 30, 8, 25, s, 0)] for s in (False, True))
    assert sum(mixed) > 25 and sum(same) < 8  # only where two packages meet in a span


def test_every_process_sees_its_piece_of_every_batch(monkeypatch):
    """Through accelerate's own sharding, as the library's trainer sets it up (even_batches off)."""
    from accelerate.data_loader import BatchSamplerShard
    batches = [[1, 2, 3, 4], [8, 7, 6, 5], [0, 9, 10, 11]]
    assert training.dealt(batches) == batches
    monkeypatch.setattr(trainer, "PROCESSES", 2)
    seen = [list(BatchSamplerShard(training.Scheduled(training.dealt(batches)), 2, process, even_batches=False)) for process in (0, 1)]
    assert seen == [[[1, 2], [8, 7], [0, 9]], [[3, 4], [6, 5], [10, 11]]]
    with pytest.raises(SystemExit, match="batch_size=3 cannot be split among 2"):
        training.dealt([[1, 2, 3]])
    with pytest.raises(SystemExit, match="one process, not 2"):
        ablations.main(None)


def test_a_part_of_the_general_questions_is_their_beginning():
    assert task.general_rows(0)[:24] == task.general_rows(24) and len(task.general_rows(0)) > 800


def test_too_few_groups_for_a_batch_is_an_error():
    with pytest.raises(ValueError, match="8 different groups"):
        training.schedule([{"group": i % 4, "package": "p", "lengths": (1, 1)} for i in range(40)], 2, 8, 4, True, 0)


def test_shuffled_pairs_keep_the_texts_of_each_package_and_break_the_pairs():
    rows = [row | {"package": "ab"[i % 2], "group": "g"} for i, row in enumerate(rows_of(*((f"a{i}", f"p{i}") for i in range(50))))]
    mixed = training.shuffled(rows, 0)
    assert [r["anchor"] for r in mixed] == [r["anchor"] for r in rows] and len({r["group"] for r in mixed}) == 50
    for package in "ab":
        assert sorted(r["positive"] for r in mixed if r["package"] == package) == sorted(r["positive"] for r in rows if r["package"] == package)
    assert sum(a["positive"] == b["positive"] for a, b in zip(rows, mixed)) < 5


# ---------------------------------------------------------------------------------------------------------------- 4 bits and LoRA

CONFIG = dict(precision="nf4", double_quant=True, compute="auto", query_prompt="own", document_prompt="own",
              max_tokens=64, base_dropout=0.0, lora_r=4, lora_alpha=8, lora_dropout=0.0,
              target_modules="all-linear", seed=0, eval_batch_size=8)
TEXTS = {i: f"def function_{i}(x):\n    return x + {i}" for i in range(12)}


@pytest.fixture
def cfg(tiny_encoder_folder):
    return SimpleNamespace(model=str(tiny_encoder_folder), **CONFIG)


def vectors(model):
    return torch.stack(list(task.embed(model, TEXTS, "document", 8).values()))


def gradients(model):
    model.train()
    with torch.autocast(models.device().type, torch.bfloat16):
        out = [model(model.preprocess(list(texts)))["sentence_embedding"] for texts in (TEXTS.values(), reversed(TEXTS.values()))]
    training.cos_sim_fp32(*out).trace().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def test_linear_layers_are_4_bit_the_pooler_is_not_and_lora_is_fp32(cfg):
    model = training.prepare(cfg, "qlora")
    kinds = {n: type(m.base_layer).__name__ for n, m in model.named_modules() if hasattr(m, "base_layer")}
    assert len(kinds) == 12 and set(kinds.values()) == {"Linear4bit"} and not any("pooler" in n for n in kinds)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and all("lora_" in n for n in trained)


def test_gradients_are_alive_and_unchanged_after_an_evaluation(cfg):
    model = training.prepare(cfg, "qlora")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.05)
    before = gradients(model)
    vectors(model.eval())
    after = gradients(model)
    assert all(torch.equal(before[n], after[n]) for n in before) and all(g.abs().max() > 0 for g in before.values())


def test_adapter_reloads_exactly_merges_closely_and_opens_with_the_plain_library(cfg, tmp_path):
    from sentence_transformers import SentenceTransformer
    model = training.prepare(cfg, "qlora")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.05)
    shown = training.save(model.eval(), cfg, tmp_path, list(TEXTS.values()))
    assert shown["reload_difference"] == 0 and shown["reload_minus_base"] > 0.01
    plain = vectors(training.with_peft(tmp_path / "adapter", cfg))
    merged = vectors(SentenceTransformer(str(tmp_path / "merged"), device="cpu"))
    base = vectors(models.load_encoder(cfg.model, "fp32", max_tokens=64))
    assert (plain - merged).abs().max() < 1e-5 < 0.01 < (plain - base).abs().max()


def test_an_adapter_that_does_not_reload_is_refused(cfg, tmp_path):
    model = training.prepare(cfg, "qlora")  # B is zero: the adapter is the identity
    with pytest.raises(SystemExit, match="reloads wrongly"):
        training.save(model.eval(), cfg, tmp_path, list(TEXTS.values()))


def test_all_linear_layers_of_bert_are_those_it_had_by_name(cfg):
    default = training.prepare(cfg, "qlora")
    cfg.target_modules = "query,key,value,dense"
    named = training.prepare(cfg, "qlora")
    assert training.trained_state(default).keys() == training.trained_state(named).keys()
    saved = default.transformers_model.peft_config["default"]
    assert saved.target_modules == {"query", "key", "value", "dense"}


def test_an_encoder_without_the_named_layers_is_told_which_it_has(cfg):
    cfg.target_modules = "q_proj,dense"
    with pytest.raises(SystemExit, match=r"no linear layer named q_proj .* it has dense, key, query, value"):
        training.prepare(cfg, "qlora")


def test_an_encoder_with_parts_after_its_pooling_is_refused(cfg, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Dense
    encoder = models.load_encoder(cfg.model, "fp32")
    encoder.append(Dense(64, 32))
    encoder.save_pretrained(str(tmp_path / "dense"), create_model_card=False)
    cfg.model = str(tmp_path / "dense")
    with pytest.raises(SystemExit, match="its Dense module is not covered"):
        training.prepare(cfg, "qlora")


def test_checkpoints_cut_short_or_of_other_knobs_are_not_resumed(tmp_path):
    for step, state in ((3, "{}\n"), (6, '{"epoch": 1'), (9, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert trainer.open_checkpoints(tmp_path, ["other"])[0] is None and not list(tmp_path.glob("checkpoint-*"))
    for step, state in ((3, "{}\n"), (6, '{"epoch": 1'), (9, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert trainer.open_checkpoints(tmp_path, ["other"])[0].endswith("checkpoint-3")


def test_more_tokens_than_the_model_reads_are_refused(cfg):
    with pytest.raises(SystemExit, match=r"max_tokens=129: .* reads at most 128 tokens"):
        models.load_encoder(cfg.model, "fp32", max_tokens=129)


def test_trained_state_with_other_names_is_refused(cfg):
    model = training.prepare(cfg, "qlora")
    state = training.trained_state(model)
    state["extra"] = torch.zeros(1)
    with pytest.raises(KeyError, match="extra"):
        training.set_trained_state(model, state)
