"""Task 3: rows trained on their own, first values, scores that two tokenizers share, windows, stages."""

import importlib
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import models, stats
from pipeline import results
from task3_tokenizer import distil, embeddings, task, vocabulary, windows

training = importlib.import_module("task3_tokenizer.03_train")
TERMS = ["NetworkX", "undirected", "крипта"]
TEXTS = [" The NetworkX library draws an undirected graph.", " Сегодня крипта растёт, and NetworkX too.",
         " plain words only, none of them new"]
WINDOWS = [{"term": "NetworkX", "text": TEXTS[0]}, {"term": "undirected", "text": TEXTS[0]},
           {"term": "крипта", "text": TEXTS[1]}]


def silent(**values):
    pass


def config(**more):
    values = dict(log_every=50, eval_batch_size=4, lora_r=4, lora_alpha=8, compute="bf16", batch_size=4)
    return training.Config(**values | more)


@pytest.fixture(scope="module")
def extended(tokenizer):
    return vocabulary.extend(tokenizer, TERMS)


@pytest.fixture(scope="module")
def arm(extended):
    new, pieces_of = extended
    return training.Arm("new", new, pieces_of, sorted(pieces_of))


@pytest.fixture(scope="module")
def init(tiny_model_folder, tmp_path_factory, arm):
    """The checkpoint before training: untied, with new rows."""
    folder = tmp_path_factory.mktemp("task3") / "init"
    training.save_untrained(config(model=str(tiny_model_folder)), arm, folder, WINDOWS)
    return folder


@pytest.fixture
def untied(init):
    return models.load_decoder(str(init), "fp32")


def batch_of(tokenizer, texts):
    return task.padded([task.ids_of(tokenizer, text) for text in texts], tokenizer.pad_token_id)


def loss(model, batch):
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


# ---------------------------------------------------------------------------------------------------- rows

def test_first_values_worked_by_hand():
    matrix = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 8.0]])

    def first(method, side="input"):
        return embeddings.initial(matrix, [[0, 1], [2]], method, side).tolist()
    assert first("mean of pieces") == [[2, 2], [5, 8]] and first("vocabulary mean") == [[3, 4], [3, 4]]
    assert first("last and first piece") == [[3, 4], [5, 8]]
    assert first("last and first piece", "output") == [[1, 0], [5, 8]]
    late = math.exp(2) / (1 + math.exp(2))  # weights exp(0) and exp(2): the last piece dominates the input
    assert first("weighted pieces")[0] == pytest.approx([1 + 2 * late, 4 * late])
    assert first("weighted pieces", "output")[0] == pytest.approx([3 - 2 * late, 4 - 4 * late])
    assert first("random") == first("random") != first("random", "output")
    with pytest.raises(ValueError, match="mean of pieces"):
        first("zeros")


@pytest.mark.parametrize("whole", [False, True])
def test_rows_of_their_own_compute_what_the_plain_matrices_compute(untied, extended, whole):
    new, pieces_of = extended
    batch = batch_of(new, TEXTS)
    with torch.no_grad():
        plain = untied(**batch).logits
        embeddings.train_rows(untied, list(pieces_of), whole)
        assert torch.allclose(untied(**batch).logits, plain, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_only_rows_learn_with_the_gradients_of_the_whole_matrix(tiny_model_folder, untied, arm, tied):
    model = models.load_decoder(str(tiny_model_folder), "fp32") if tied else untied
    model.resize_token_embeddings(len(arm.tokenizer), mean_resizing=False)
    batch = batch_of(arm.tokenizer, TEXTS)
    model.requires_grad_(True)
    loss(model, batch).backward()
    whole = [layer.weight.grad[arm.ids].clone() for layer in embeddings.both(model)]
    model.zero_grad()
    rows, matrices = embeddings.train_rows(model, arm.ids)
    loss(model, batch).backward()
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == learning
    assert len(rows) == 2 - tied and not matrices
    for row, gradient in zip(rows, whole):
        assert torch.allclose(row.grad, gradient, atol=1e-5) and gradient.abs().max() > 0


def train_stage(arm, stage, source, target, **knobs):
    return training.train_stage(config(**knobs), arm, stage, source, target, WINDOWS * 4, 4, WINDOWS, silent)


def test_old_rows_are_bit_identical_after_training_with_decay_and_clipping(tmp_path, tokenizer, init, arm):
    """The common way, a whole matrix with masked gradients, moves them: decay acts without a gradient too."""
    knobs = dict(weight_decay=0.5, max_grad_norm=0.01)
    stats = train_stage(arm, training.Stage(4, 1e-2), init, tmp_path / "a", **knobs)
    assert stats["input_largest_change_of_other_rows"] == stats["output_largest_change_of_other_rows"] == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (init, tmp_path / "a"))
    for old, trained in zip(embeddings.both(before), embeddings.both(after)):
        n, old, trained = len(tokenizer), old.weight, trained.weight
        assert torch.equal(old[:n], trained[:n]) and not torch.equal(old[n:], trained[n:])

    matrix = torch.nn.Parameter(old.detach().float().clone())
    matrix.grad = torch.zeros_like(matrix)
    torch.optim.AdamW([matrix], lr=1e-2, weight_decay=0.5).step()
    assert not torch.equal(matrix[:n], old[:n].float())


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_a_stage_that_moves_frozen_rows_is_not_saved(compute, tmp_path, init, arm, monkeypatch):
    write = embeddings.write_rows
    monkeypatch.setattr(embeddings, "write_rows",
                        lambda model, ids, *more: write(model, [i - 1 for i in ids], *more))
    with pytest.raises(AssertionError, match="rows moved"):
        train_stage(arm, training.Stage(4, 1e-2), init, tmp_path / "a", compute=compute)
    assert not (tmp_path / "a").exists()


def test_a_stage_with_lora_is_saved_as_it_was_trained(tmp_path, init, arm):
    """Rows, matrices and merged adapter: the checkpoint differs from its source where it must."""
    train_stage(arm, training.Stage(4, 1e-2, 1e-3, 1e-2, "attention"), init, tmp_path / "c")
    before, after = (dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
                     for folder in (init, tmp_path / "c"))
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert not torch.equal(after["model.embed_tokens.weight"], after["lm_head.weight"])
    moved = (after["lm_head.weight"] - before["lm_head.weight"]).abs()
    assert moved[arm.ids].max() > 3 * moved[:min(arm.ids)].max()  # each at its own rate


def test_an_untied_head_survives_saving_loading_and_lm_eval(untied, tmp_path, extended):
    from lm_eval.models.huggingface import HFLM
    new, _ = extended
    with torch.no_grad():
        untied.get_output_embeddings().weight.mul_(-1)  # as different as can be
    untied.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    # The attention kernel is that of load_decoder on a CPU.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = batch_of(new, TEXTS)
    with torch.no_grad():
        expected = untied.eval()(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        assert torch.equal(harness.model(**batch).logits, expected)
    assert [tokenizer(t).input_ids for t in TEXTS] == [new(t).input_ids for t in TEXTS]


def test_rows_are_written_in_the_order_of_the_ids_given(untied):
    """Not in sorted order."""
    before = [layer.weight.detach().clone() for layer in embeddings.both(untied)]
    rows = [torch.full((3, 64), float(side)) + torch.arange(3.0)[:, None] for side in (10, 20)]
    embeddings.write_rows(untied, [700, 5, 90], rows)
    for side, old, layer in zip((10, 20), before, embeddings.both(untied)):
        assert layer.weight[[700, 5, 90], 0].tolist() == [side, side + 1, side + 2]
        assert torch.equal(layer.weight[91:700], old[91:700])
    learnt, _ = embeddings.train_rows(untied, [90, 700, 5])
    assert learnt[0][:, 0].tolist() == [12, 10, 11] and learnt[1][:, 0].tolist() == [22, 20, 21]


def test_distilled_rows_are_read_as_their_pieces_were(tiny_model_folder, tokenizer, extended, arm):
    """The error of the hidden states falls, and nothing but the new input rows changes. A window whose end
    holds another term is left out: its last tokens are not the same."""
    new, pieces_of = extended
    rows = [{"text": text, "start": text.index(term), "end": text.index(term) + len(term)}
            for text, term in ((TEXTS[0], "undirected"), (TEXTS[1], "NetworkX"), (TEXTS[0], "NetworkX"))]
    pairs = distil.pairs(rows, tokenizer, new)
    assert [n for *_, n in pairs] == [1 + len(task.ids_of(tokenizer, end)) for end in (" graph.", " too.")]
    model = models.load_decoder(str(tiny_model_folder), "fp32")
    embeddings.untie(model)
    model.resize_token_embeddings(len(new), mean_resizing=False)
    embeddings.initialise(model, pieces_of, "distilled", 0)
    before = [layer.weight.clone() for layer in embeddings.both(model)]
    losses = distil.fit(model, arm.ids, rows, tokenizer, new, "fp32", epochs=20)
    assert losses[-1] < 0.7 * losses[0]
    moved = [(layer.weight - old).abs().amax(1) > 0 for layer, old in zip(embeddings.both(model), before)]
    read = {i for _, ids, _ in pairs for i in ids} & set(arm.ids)
    assert set(moved[0].nonzero()[:, 0].tolist()) == read and not moved[1].any()


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_starts_distilled_if_the_knob_says_so(tied, tiny_model_folder, tmp_path, tokenizer, arm,
                                                        init):
    """From windows of (a) and no others, as often as `distil_passes`; the output rows stay as they were."""
    rows = [{"term": term, "text": f" {word} {term} too", "start": 2 + len(word),
             "end": 2 + len(word) + len(term)} for word in ("an", "the", "this", "that") for term in TERMS]
    seen, fit = [], distil.fit

    def spy(model, ids, texts, old, new, compute, passes):
        seen.append((texts, passes, fit(model, ids, texts, old, new, compute, passes)))

    cfg = config(model=str(tiny_model_folder), init="distilled", distil_passes=3, tied=tied, compute="fp32",
                 texts_a=1, texts_b=1, texts_c1=1, texts_c2=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "fit", spy)
        next(training.train(cfg, arm, tmp_path, rows, rows, "", silent))
        assert next(training.train(cfg, training.Arm("control", tokenizer, {}, [5]), tmp_path / "control",
                                   rows, rows, "", silent))[0] == "init"
    ((texts, passes, losses),) = seen  # the control has no new rows
    assert Counter(row["term"] for row in texts) == dict.fromkeys(TERMS, 1)
    assert {row["text"] for row in texts} == {f" an {term} too" for term in TERMS}
    assert passes == len(losses) == 3 and losses[-1] < losses[0]
    before, after = (embeddings.both(models.load_decoder(str(folder), "fp32"))
                     for folder in (init, tmp_path / "init"))
    own = [task.ids_of(arm.tokenizer, f" {term}")[0] for term in TERMS]
    assert (after[0].weight[own] - before[0].weight[own]).abs().min(1).values.max() > 0
    assert torch.equal(*(layer.weight for layer in after)) == tied
    assert tied or torch.allclose(after[1].weight, before[1].weight, atol=1e-2)  # `init` is in bf16


# -------------------------------------------------------------------------------------------------- scores

def test_a_score_is_that_of_a_plain_forward_pass(untied, extended):
    new, pieces_of = extended
    start = TEXTS[0].index("undirected")
    row = {"text": TEXTS[0], "start": start, "end": start + len("undirected")}
    item, other = task.score(untied, new, [row, {"text": TEXTS[2]}], 2, list(pieces_of))
    ids = [new.eos_token_id, *task.ids_of(new, TEXTS[0])]
    with torch.no_grad():
        logprobs = untied(torch.tensor([ids])).logits[0, :-1].log_softmax(1)
    nats = [-logprobs[i, t].item() for i, t in enumerate(ids[1:])]
    place = ids[1:].index(task.ids_of(new, " undirected")[0])
    rank = 1 + int((logprobs[place] > -nats[place]).sum())
    others = [i for i, t in enumerate(ids[1:]) if t not in pieces_of]
    mass = logprobs[others][:, list(pieces_of)].exp().sum().item()
    assert item == {"id": item["id"], "nats": pytest.approx(sum(nats), abs=1e-4), "tokens": len(nats),
                    "bytes": len(TEXTS[0].encode()), "mass": pytest.approx(mass, rel=1e-3),
                    "term_nats": pytest.approx(nats[place], abs=1e-4), "rank": rank,
                    "reciprocal_rank": 1 / rank, "after_bytes": len(" graph."),
                    "after_nats": pytest.approx(sum(nats[place + 1:]), abs=1e-4),
                    "detection_nats": pytest.approx(-logprobs[place, list(pieces_of)].logsumexp(0).item(),
                                                    abs=1e-4),
                    "identification_nats": pytest.approx(item["term_nats"] - item["detection_nats"])}
    assert set(other) == {"id", "nats", "tokens", "bytes", "mass"} and other["id"] != item["id"]
    assert "mass" not in task.score(untied, new, [row], 2)[0]


def test_a_term_costs_that_a_new_token_comes_and_which(untied, tokenizer, extended, monkeypatch):
    """Worked by hand: the new ids have half of the probability, 1 bit, and the own id a quarter of that, 2
    bits. A term of several old pieces has no such parts."""
    new, pieces_of = extended
    (own,) = task.ids_of(new, " undirected")
    chances = torch.full((len(new),), 0.5 / (len(new) - len(pieces_of)))
    chances[list(pieces_of)] = 0.375 / (len(pieces_of) - 1)
    chances[own] = 0.125
    monkeypatch.setattr(models, "logits_of", lambda model, states: chances.log().repeat(len(states), 1))
    start = TEXTS[0].index("undirected")
    row = {"text": TEXTS[0], "start": start, "end": start + len("undirected")}
    items = task.score(untied, new, [row, row], 2, list(pieces_of))
    assert items[0]["detection_nats"] + items[0]["identification_nats"] == pytest.approx(
        items[0]["term_nats"], abs=1e-9)
    values = {r["metric"]: r["value"] for r in task.rows_of("term windows", "new", items)}
    assert values["term_bits"] == pytest.approx(3, abs=1e-5)
    assert values["detection_bits"] == pytest.approx(1, abs=1e-5)
    assert values["identification_bits"] == pytest.approx(2, abs=1e-5)
    for way, ids in ((tokenizer, ()), (tokenizer, list(pieces_of)), (new, ())):
        (item,) = task.score(untied, way, [row], 1, ids)
        assert "term_nats" in item and not {"detection_nats", "identification_nats"} & set(item)


def test_a_term_alone_can_be_encoded_by_another_tokenizer(tokenizer, extended):
    """The text around it stays as it is, or two ways to write a term would stand in different contexts."""
    new, _ = extended
    text = " NetworkX and NetworkX again"
    start = text.index("NetworkX", 5)
    row = {"text": text, "start": start, "end": start + len("NetworkX")}
    (ids, place), (other, where) = task.encode(new, row), task.encode(new, row, tokenizer)
    assert other[slice(*where)] == task.ids_of(tokenizer, " NetworkX") and place[1] - place[0] == 1
    assert other[:where[0]] == ids[:place[0]] and other[where[1]:] == ids[place[1]:]
    across = {"text": " the undirectedness of it", "start": 5, "end": 7}  # a token reaches over the border
    assert task.encode(tokenizer, across) == (task.ids_of(tokenizer, across["text"]), None)


ITEMS = [{"id": str(k), "nats": 100.0 + k, "bytes": 200, "tokens": 50, "term_nats": 3.0 + k}
         for k in range(6)]
BETTER = [item | {"nats": item["nats"] - 20 - item["term_nats"]} for item in ITEMS]


def test_a_metric_is_one_entry_and_is_seen_in_rows_deltas_and_verdicts(monkeypatch):
    own = stats.Metric("nats_per_token", "nats per token", "nats", "tokens", better="lower")
    monkeypatch.setattr(task, "METRICS", [*task.METRICS, own])
    rows = {r["metric"]: r for r in task.rows_of("term windows", "base", ITEMS, stage="a")}
    assert set(rows) == {"bits_per_byte", "term_bits", "tokens_per_byte", "nats_per_token"}
    assert rows["nats_per_token"]["value"] == pytest.approx(102.5 / 50)
    assert {row["stage"] for row in rows.values()} == {"a"}
    assert rows["bits_per_byte"]["value"] == pytest.approx(102.5 / 200 / math.log(2))
    deltas = {r["metric"]: r for r in task.delta_rows("minus base", "new", ITEMS, BETTER)}
    assert set(deltas) == {"bits_per_byte", "term_bits", "nats_per_token"}  # those with a direction
    assert deltas["nats_per_token"]["verdict"] == deltas["bits_per_byte"]["verdict"] == "improved"


def test_items_without_a_term_are_left_out_of_what_is_about_terms_and_pairs_are_checked():
    across = [dict(item) for item in BETTER]
    del across[2]["term_nats"]
    n = {r["metric"]: r["n"] for r in task.rows_of("term windows", "AddedToken", across)}
    assert n["bits_per_byte"] == 6 and n["term_bits"] == 5
    n = {r["metric"]: r["n"] for r in task.delta_rows("minus 03", "AddedToken", ITEMS, across)}
    assert n == {"bits_per_byte": 6, "term_bits": 5}
    assert not task.rows_of("cosines", "input", [{"id": "one", "anchors": 0.5}])  # no interval of one item
    for other in (BETTER[::-1], BETTER[:5]):
        with pytest.raises(ValueError):
            task.delta_rows("minus 03", "AddedToken", ITEMS, other)


# -------------------------------------------------------------------------------------- windows and stages

def test_windows_are_whole_words_around_the_use():
    text = " " + " ".join(f"word{i}" for i in range(60))
    row = windows.around(text, text.index("word30"), len("word30"))
    assert row["text"][row["start"]:row["end"]] == "word30" and row["text"][0] == " "
    assert set(row["text"].split()) < set(text.split()) and 150 < len(row["text"]) < 200
    assert windows.places(" a NaN, (NaN) NaN's NaNs xNaN NaN-like NaN", "NaN") == [3, 39]


def test_near_copies_of_training_or_of_each_other_are_left_out():
    def row(k, end=""):
        return {"term": "t", "text": " ".join(f"w{k}{i}" for i in range(30)) + end}
    rows = [row(1, " more"), row(2), row(2, " more"), row(3), row(4)]
    assert windows.near_copies([row(1)], rows) == [True, False, True, False, False]
    assert windows.distinct([row(1)], rows, "term", 2) == [rows[1], rows[3]]


def test_every_term_comes_once_a_round_and_no_window_twice():
    rows = [{"term": t, "text": f"{t}{i}"} for t in "abcd" for i in range(12 if t != "d" else 3)]
    ordered = windows.interleave_terms(rows, seed=0, batch_size=4)
    assert sorted(r["text"] for r in ordered) == sorted(r["text"] for r in rows)
    assert ordered == windows.interleave_terms(rows, 0, 4) != windows.interleave_terms(rows, 1, 4)
    one_span = [{"term": t, "text": f"{t}{i}"} for t in "abcd" for i in range(8)]
    later = [{"term": t, "text": "a later round"} for t in "abcd"]
    first = windows.interleave_terms(one_span + later, 0, 4)[:32]
    assert Counter(r["term"] for r in first) == dict.fromkeys("abcd", 8)


def test_stages_share_what_there_is_or_refuse():
    asked = {"a": 30, "b": 10, "c1": 10, "c2": 10}
    assert windows.texts_per_stage(asked, 60) == windows.texts_per_stage(asked, 200) == asked
    assert windows.texts_per_stage(asked, 30) == {"a": 15, "b": 5, "c1": 5, "c2": 5}
    assert set(windows.texts_per_stage(asked, 4).values()) == {1}
    with pytest.raises(SystemExit, match="at least one"):
        windows.texts_per_stage(asked, 3)


def test_every_term_has_texts_in_every_stage_and_none_twice():
    """At the sizes of the gpu profile, where a term of 60 windows would otherwise be used up in (a)."""
    rows = [{"term": t, "text": f"{t}{i}"} for t, n in (("a", 700), ("b", 60), ("c", 5)) for i in range(n)]
    parts = windows.split_into_stages(rows, {"a": 100, "b": 50, "c1": 50, "c2": 50})
    counts = {stage: Counter(r["term"] for r in part) for stage, part in parts.items()}
    assert counts["a"] == {"a": 100, "b": 24, "c": 2}
    assert counts["b"] == counts["c1"] == counts["c2"] == {"a": 50, "b": 12, "c": 1}
    texts = [r["text"] for part in parts.values() for r in part]
    assert len(texts) == len(set(texts)) == 250 + 60 + 5


def test_rates_fall_with_the_square_root_of_the_batch():
    cfg = config(batch_size=16, lr_rows=1e-2, lr_rows_later=4e-3, lr_matrices=2e-4, lr_lora=1e-3)
    full, quarter = training.stages(cfg, 16), training.stages(cfg, 4)
    assert tuple(full) == task.STAGES and full["a"].lr_rows == 1e-2 and full["a"].lr_matrices is None
    assert quarter["c1"][1:4] == pytest.approx((2e-3, 1e-4, 5e-4)) and full["b"].lr_lora is None


class Stopped(Exception):
    pass


@pytest.mark.all
def test_training_goes_on_after_the_last_finished_stage_and_ends_the_same(tiny_model_folder, tmp_path, arm):
    cfg = config(model=str(tiny_model_folder), texts_a=1, texts_b=1, texts_c1=1, texts_c2=1, log_every=1)
    rows = [row | {"text": row["text"] + f" {k}"} for k in range(4) for row in WINDOWS]

    def train(folder, log=silent, **more):
        return dict(training.train(cfg, arm, tmp_path / folder, rows, WINDOWS, "data", log, **more))

    def stop_in_c1(stage, **values):
        if stage == "new/c1":
            raise Stopped
    whole = train("whole")
    with pytest.raises(Stopped):
        train("stopped", stop_in_c1)
    written = (tmp_path / "stopped" / "b" / "stage.json").stat().st_mtime_ns
    assert not (tmp_path / "stopped" / "c1").exists()
    resumed = train("stopped")
    assert (tmp_path / "stopped" / "b" / "stage.json").stat().st_mtime_ns == written
    assert list(resumed) == ["init", *task.STAGES]
    for stage in task.STAGES:
        assert resumed[stage]["losses"] == whole[stage]["losses"]
        assert results.sha256(tmp_path / "whole" / stage / "model.safetensors") == \
            results.sha256(tmp_path / "stopped" / stage / "model.safetensors")
    lines = []
    assert train("whole", lambda **values: lines.append(values)) == whole and not lines  # not trained again


def test_a_model_with_its_own_head_cannot_be_tied(init, arm, tmp_path):
    with pytest.raises(SystemExit, match="has an output head of its own"):
        training.save_untrained(config(model=str(init), tied=True), arm, tmp_path, WINDOWS)


# ------------------------------------------------------------------------------------------------- cosines

def test_cosines_and_neighbours_of_a_matrix_made_by_hand(tokenizer):
    matrix = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1],
                           [0, 0, -1], [-0.9, -0.1, 0]])  # mean 0
    layer = SimpleNamespace(weight=matrix + 5)
    model = SimpleNamespace(get_input_embeddings=lambda: layer, get_output_embeddings=lambda: layer)

    def words(text, **options):
        return SimpleNamespace(input_ids=[{" near": 1, " far": 2}[text]])
    term = {"term": "t", "anchors": ["near"], "negative_anchors": ["far"]}
    found = embeddings.cosines(model, words, [term, {"term": "u", "anchors": [], "negative_anchors": []}],
                               {"t": 0, "u": 3}, {1: "near", 2: "far", 3: "across"})
    item, bare = found["input"]
    near = 0.9 / math.hypot(0.9, 0.1)
    assert item == {"id": "t", "neighbours": ["near", "across", "far"],
                    "anchors": pytest.approx(near, abs=1e-5), "negatives": pytest.approx(-1, abs=1e-5),
                    "contrast": pytest.approx(near + 1, abs=1e-5)}
    assert set(bare) == {"id", "neighbours"} and found["output"][0] == item


def test_whole_words_are_entries_that_begin_with_a_space(tokenizer):
    words = embeddings.whole_words(tokenizer)
    (with_space,), (without,) = task.ids_of(tokenizer, " graph"), task.ids_of(tokenizer, "graph")
    assert words[with_space] == "graph" and without not in words


def test_the_test_texts_are_read_by_kind(tmp_path):
    window, *others = ({"set": kind, "text": kind} for kind in ("term windows", "any text", "any text"))
    results.write_rows(tmp_path / "test.jsonl", [window, *others])
    run = SimpleNamespace(rows=lambda split: results.read_rows(tmp_path / f"{split}.jsonl"))
    assert task.test_sets(run) == {"term windows": [window], "any text": others}


def test_near_copies_of_own_texts_stay_in_one_split_only(tmp_path):
    """A text of the test split that stands in training with one word changed is dropped from training."""
    words = [f"word{i}" for i in range(30)]
    changed = " ".join(["another", *words[1:]])
    others = [" ".join(f"other{i}x{j}" for j in range(12)) for i in range(100)]
    others = [{"body": text, "part": "train"} for text in others]
    rows = [{"body": changed, "part": "train"}, {"body": " ".join(words), "part": "test"},
            {"body": " ".join(words), "part": "dev"}, {"body": "too short", "part": "dev"}, *others]
    results.write_rows(tmp_path / "own.jsonl", rows)
    cfg = task.Config(data=str(tmp_path / "own.jsonl"), columns="text=body split=part")
    found, n_texts = task.documents(cfg)
    assert n_texts == 104 and len(found) == 102  # one short, one exact repeat
    kept = importlib.import_module("task3_tokenizer.01_data").without_near_copies(found)
    assert len(kept) == 101 and not any("another" in row["text"] for row in kept)
    results.write_rows(tmp_path / "own.jsonl", [{"completion": row["body"]} for row in others])
    found, _ = task.documents(task.Config(data=str(tmp_path / "own.jsonl")))
    assert {row["text"] for row in found} == {f" {row['body']}" for row in others}
