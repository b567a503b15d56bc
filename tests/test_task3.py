"""Task 3: rows trained on their own, first values, scores that two tokenizers share, windows, what a row looks like from inside."""

import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import models
from task3_tokenizer import embeddings, intrinsic, task, training, vocabulary, windows

TERMS = ["NetworkX", "undirected", "крипта"]


@pytest.fixture(scope="module")
def extended(tokenizer):
    new, added = vocabulary.extend(tokenizer, TERMS)
    return new, vocabulary.spell(added, tokenizer.get_vocab())


@pytest.fixture
def untied(tiny_model_folder, extended):
    new, splits = extended
    model = models.load_decoder(str(tiny_model_folder), "fp32")
    embeddings.untie(model)
    model.resize_token_embeddings(len(new), mean_resizing=False)
    for side, matrix in (("input", model.get_input_embeddings().weight), ("output", model.get_output_embeddings().weight)):
        with torch.no_grad():
            matrix[sorted(splits)] = embeddings.initial(matrix, [splits[i] for i in sorted(splits)], "mean of pieces", side)
    return model


def batch_of(tokenizer, texts):
    return training.collate([tokenizer(t, add_special_tokens=False).input_ids for t in texts], tokenizer.pad_token_id)


TEXTS = [" The NetworkX library draws an undirected graph.", " Сегодня крипта растёт, and NetworkX too.", " plain words only, none of them new"]

# ---------------------------------------------------------------------------------------------------------------- rows


def test_new_entries_are_spelled_by_the_old_vocabulary(tokenizer, extended):
    new, splits = extended
    for term in TERMS:
        (new_id,) = new(f" {term}", add_special_tokens=False).input_ids
        assert splits[new_id] == tokenizer(f" {term}", add_special_tokens=False).input_ids


def test_first_values_worked_by_hand():
    matrix = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 8.0]])
    splits = [[0, 1], [2]]

    def first(method, side="input"):
        return embeddings.initial(matrix, splits, method, side).tolist()
    assert first("mean of pieces") == [[2, 2], [5, 8]] and first("vocabulary mean") == [[3, 4], [3, 4]]
    assert first("last and first piece") == [[3, 4], [5, 8]] and first("last and first piece", "output") == [[1, 0], [5, 8]]
    late = math.exp(2) / (1 + math.exp(2))  # weights exp(0) and exp(2): the last piece dominates the input, the first the output
    assert first("weighted pieces")[0] == pytest.approx([1 + 2 * late, 4 * late])
    assert first("weighted pieces", "output")[0] == pytest.approx([3 - 2 * late, 4 - 4 * late])
    assert first("random") == first("random") != first("random", "output")
    with pytest.raises(ValueError, match="mean of pieces"):
        first("zeros")


@pytest.mark.parametrize("whole", [False, True])
def test_rows_of_their_own_compute_what_the_plain_matrices_compute(untied, extended, whole):
    new, splits = extended
    batch = batch_of(new, TEXTS)
    with torch.no_grad():
        plain = untied(**batch).logits
        embeddings.train_rows(untied, list(splits), whole)
        assert torch.allclose(untied(**batch).logits, plain, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_rows_learn_and_their_gradients_are_those_of_the_whole_matrix(tiny_model_folder, untied, extended, tied):
    new, splits = extended
    model = models.load_decoder(str(tiny_model_folder), "fp32") if tied else untied
    model.resize_token_embeddings(len(new), mean_resizing=False)
    ids, batch = sorted(splits), batch_of(new, TEXTS)
    model.requires_grad_(True)
    model(**batch).loss.backward()
    whole = [m.weight.grad[ids].clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    model.zero_grad()
    rows, matrices = embeddings.train_rows(model, ids)
    model(**batch).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(rows) == 2 - tied and not matrices
    for row, gradient in zip(rows, whole):
        assert torch.allclose(row.grad, gradient, atol=1e-5) and gradient.abs().max() > 0


def test_old_rows_are_bit_identical_after_training_with_decay_and_clipping(tiny_model_folder, tmp_path, tokenizer, extended):
    """The common way, a whole matrix with masked gradients, moves them: decay acts where there is no gradient."""
    new, splits = extended
    cfg = config(weight_decay=0.5, max_grad_norm=0.01, model=str(tiny_model_folder))
    training.begin(cfg, tmp_path / "init", new, splits, WINDOWS, "x")
    training.train_stage(cfg, tmp_path / "init", tmp_path / "a", new, sorted(splits), False, [], (1e-2,), WINDOWS * 4, 4, WINDOWS, "x",
                         lambda **k: None)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("init", "a"))
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, trained = (getattr(m, get)().weight for m in (before, after))
        assert torch.equal(old[:len(tokenizer)], trained[:len(tokenizer)])
        assert not torch.equal(old[len(tokenizer):], trained[len(tokenizer):])

    matrix = torch.nn.Parameter(old.detach().float().clone())
    optimizer = torch.optim.AdamW([matrix], lr=1e-2, weight_decay=0.5)
    matrix.grad = torch.zeros_like(matrix)
    optimizer.step()
    assert not torch.equal(matrix[:len(tokenizer)], old[:len(tokenizer)].float())


class Knobs:
    def __init__(self, **values):
        self.__dict__.update(values)


def config(**more):
    values = dict(seed=0, tied=False, init="mean of pieces", weight_decay=0.0, schedule="cosine", warmup=0.1, max_grad_norm=1.0, log_every=50,
                  eval_batch_size=4, lora_r=4, lora_alpha=8, lora_dropout=0.0, compute="bf16")
    return Knobs(**values | more)


WINDOWS = [{"term": "NetworkX", "text": TEXTS[0]}, {"term": "undirected", "text": TEXTS[0]}, {"term": "крипта", "text": TEXTS[1]}]


def test_a_stage_with_lora_is_saved_as_it_was_trained(tiny_model_folder, tmp_path, extended):
    """Rows and merged adapter of all matrices: the checkpoint on disk, opened plainly, differs from its source everywhere it should."""
    new, splits = extended
    cfg = config(model=str(tiny_model_folder))
    training.begin(cfg, tmp_path / "init", new, splits, WINDOWS, "x")
    training.train_stage(cfg, tmp_path / "init", tmp_path / "c", new, sorted(splits), True, ["q_proj", "up_proj"], (1e-2, 1e-3, 1e-2),
                         WINDOWS * 4, 4, WINDOWS, "x", lambda **k: None)
    before, after = (dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters()) for name in ("init", "c"))
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"embed_tokens", "lm_head", "q_proj", "up_proj"}
    assert not torch.equal(after["model.embed_tokens.weight"], after["lm_head.weight"])
    moved = (after["lm_head.weight"] - before["lm_head.weight"]).abs()
    assert moved[sorted(splits)].max() > 3 * moved[:min(splits)].max()  # each at its own rate


def test_an_untied_head_survives_saving_loading_and_lm_eval(untied, tmp_path, extended):
    from lm_eval.models.huggingface import HFLM
    new, _ = extended
    with torch.no_grad():
        untied.get_output_embeddings().weight.mul_(-1)  # as different as can be
    untied.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()  # as load_decoder on a CPU
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = batch_of(new, TEXTS)
    with torch.no_grad():
        expected = untied.eval()(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        assert torch.equal(harness.model(**batch).logits, expected)
    assert [tokenizer(t).input_ids for t in TEXTS] == [new(t).input_ids for t in TEXTS]


# ---------------------------------------------------------------------------------------------------------------- scores


def test_a_score_is_that_of_a_plain_forward_pass(untied, extended):
    new, splits = extended
    row = {"text": TEXTS[0], "start": TEXTS[0].index("undirected"), "end": TEXTS[0].index("undirected") + len("undirected")}
    (item, other) = task.score(untied.eval(), new, [row, {"text": TEXTS[2]}], 2, list(splits))
    ids = [new.eos_token_id, *new(TEXTS[0], add_special_tokens=False).input_ids]
    with torch.no_grad():
        logprobs = untied(torch.tensor([ids])).logits[0, :-1].log_softmax(1)
    nats = [-logprobs[i, t].item() for i, t in enumerate(ids[1:])]
    place = ids[1:].index(new(" undirected", add_special_tokens=False).input_ids[0])
    assert item["nats"] == pytest.approx(sum(nats), abs=1e-4) and item["bytes"] == len(TEXTS[0].encode())
    assert item["term_nats"] == pytest.approx(nats[place], abs=1e-4) and item["term_tokens"] == 1
    assert item["after_nats"] == pytest.approx(sum(nats[place + 1:]), abs=1e-4) and item["after_bytes"] == len(" graph.")
    assert item["rank"] == 1 + int((logprobs[place] > -nats[place]).sum())
    others = [i for i, t in enumerate(ids[1:]) if t not in splits]
    assert item["mass"] == pytest.approx(logprobs[others][:, list(splits)].exp().sum().item(), rel=1e-3)
    assert "rank" not in other and other["mass"] > 0


def test_bits_per_byte_do_not_depend_on_the_tokenizer_as_such(tokenizer, extended):
    """A model that gives every token of a text e nats: more tokens, more bits; the bytes stay."""
    new, _ = extended
    text = TEXTS[0]
    items = [{"nats": float(len(task.ids_of(t, text))), "bytes": len(text.encode()), "tokens": 1} for t in (tokenizer, new)]
    values = [task.column([i], "bits_per_byte") for i in items]
    assert values[0][1] == values[1][1] == len(text.encode()) and values[0][0] > values[1][0]


def test_a_term_alone_can_be_spelled_by_another_tokenizer(tokenizer, extended):
    """Around it all stays as it is: else two spellings of a term would stand in different contexts."""
    new, _ = extended
    text = " NetworkX and NetworkX again"
    row = {"text": text, "start": text.index("NetworkX", 5), "end": text.index("NetworkX", 5) + len("NetworkX")}
    (ids, place), (spelled, where) = task.encode(new, row), task.encode(new, row, tokenizer)
    assert spelled[where[0]:where[1]] == task.ids_of(tokenizer, " NetworkX") and place[1] - place[0] == 1
    assert spelled[:where[0]] == ids[:place[0]] and spelled[where[1]:] == ids[place[1]:]


def test_windows_are_whole_words_around_the_use():
    text = " " + " ".join(f"word{i}" for i in range(60))
    start = text.index("word30")
    row = windows.around(text, start, len("word30"))
    assert row["text"][row["start"]:row["end"]] == "word30" and row["text"][0] == " "
    assert set(row["text"].split()) < set(text.split()) and 150 < len(row["text"]) < 200
    assert windows.places(" a NaN, (NaN) NaN's NaNs xNaN NaN-like NaN", "NaN") == [3, 39]


def test_every_term_comes_once_a_round_and_no_window_twice():
    rows = [{"term": t, "text": f"{t}{i}" * (i + 1)} for t in "abcd" for i in range(12 if t != "d" else 3)]
    shown = training.in_turn(rows, seed=0, batch_size=4, each=8)
    assert len(shown) == len({r["text"] for r in shown}) == 3 * 8 + 3 and len(training.in_turn(rows, 0, 4)) == len(rows)
    assert shown[:8] != sorted(shown[:8], key=lambda r: r["term"]) and training.in_turn(rows, 0, 4, 4) == training.in_turn(rows, 0, 4, 4)


def test_stages_share_what_there_is_or_refuse():
    knobs = config(texts_a=30, texts_b=10, texts_c1=10, texts_c2=10)
    assert training.shares(knobs, 60) == training.shares(knobs, 200) == {"a": 30, "b": 10, "c1": 10, "c2": 10}
    assert training.shares(knobs, 30) == {"a": 15, "b": 5, "c1": 5, "c2": 5} and set(training.shares(knobs, 4).values()) == {1}
    with pytest.raises(SystemExit, match="at least one"):
        training.shares(knobs, 3)


def test_every_term_has_texts_in_every_stage_and_none_twice():
    """At the sizes of the gpu profile, where a term of 60 windows would otherwise be used up in (a)."""
    knobs = config(texts_a=100, texts_b=50, texts_c1=50, texts_c2=50)
    rows = [{"term": t, "text": f"{t}{i}"} for t, n in (("a", 700), ("b", 60), ("c", 5)) for i in range(n)]
    dealt = training.deal(knobs, rows)
    counts = {stage: Counter(r["term"] for r in part) for stage, part in dealt.items()}
    assert counts["a"] == {"a": 100, "b": 24, "c": 2} and counts["b"] == counts["c1"] == counts["c2"] == {"a": 50, "b": 12, "c": 1}
    everything = [r["text"] for part in dealt.values() for r in part]
    assert len(everything) == len(set(everything)) == 250 + 60 + 5


def test_rates_fall_with_the_square_root_of_the_batch():
    knobs = config(batch_size=16, lr_rows=1e-2, lr_rows_later=4e-3, lr_matrices=2e-4, lr_lora=1e-3)
    assert training.rates(knobs, "a", 16) == (1e-2, 2e-4, 1e-3)
    assert training.rates(knobs, "c1", 4) == pytest.approx((2e-3, 1e-4, 5e-4))


# ---------------------------------------------------------------------------------------------------------------- inside


def test_cosines_and_neighbours_of_a_matrix_made_by_hand():
    matrix = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1], [-0.9, -0.1, 0]])  # mean 0
    units = intrinsic.centred(matrix + 5)
    assert torch.allclose(units, torch.nn.functional.normalize(matrix, dim=1), atol=1e-6)
    cosine, share = intrinsic.against_words(units, 0, [1], torch.tensor([2, 3, 4]))
    assert cosine == pytest.approx(0.9 / math.hypot(0.9, 0.1), abs=1e-6) and share == 1
    assert intrinsic.neighbours(units, 0, {1: "near", 2: "far", 3: "across"}, k=2) == ["near", "across"]


def test_a_row_that_is_the_true_one_is_found_and_another_is_not():
    matrix = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    words = {i: str(i) for i in range(200)}
    same, other = intrinsic.against_truth(matrix, [3, 4], torch.stack([matrix[3], matrix[9]]), words)
    assert same["cosine"] == pytest.approx(1, abs=1e-5) and same["rank"] == 1 and same["overlap"] == 1
    assert other["rank"] > 1 and other["overlap"] < 1


def test_a_hidden_word_falls_into_pieces_and_all_others_stay(tokenizer):
    hidden = vocabulary.without(tokenizer, ["polynomial", "graph"])
    assert len(vocabulary.pieces(hidden, " polynomial")) > 1 and len(vocabulary.pieces(hidden, " graph")) > 1
    assert hidden.get_vocab() == tokenizer.get_vocab() and hidden(" the matrix 😀").input_ids == tokenizer(" the matrix 😀").input_ids
