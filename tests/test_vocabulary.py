"""New words: one id in every context they should have, none where they should not, nothing else changed."""

import copy
import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from task3_tokenizer import vocabulary

TERMS = ["NetworkX", "undirected", "Chebyshev", "крипта", "айтишка", "estimator"]
MIXED = ["The NetworkX graph is undirected.", "Сегодня крипта растёт, а айтишка нет 😀\n\n  новая   строка\t",
         "def f(x):\n    return x ** 2  # 🙂", "estimator", " estimators and (estimator) and the estimator",
         "Chebyshev's Chebyshevs", "", " ", "ünïcödé — „quotes“"]


@pytest.fixture(scope="module")
def extended(tokenizer):
    return vocabulary.extend(tokenizer, TERMS)


def test_a_term_is_one_id_after_any_space(extended):
    new, _ = extended
    for term in TERMS:
        (entry,) = vocabulary.pieces(new, f" {term}")
        for text in (f" {term}", f"see {term}, or", f"( {term})", f"\n\n {term} "):
            assert vocabulary.pieces(new, text).count(entry) == 1, text


def test_a_term_does_not_fire_inside_other_words(extended, tokenizer):
    new, _ = extended
    for text in ("MyNetworkX", "preundirected", "xestimator", "антикрипта"):
        assert new(text).input_ids == tokenizer(text).input_ids


def test_old_ids_stay_and_new_ids_follow_without_a_gap(extended, tokenizer):
    new, pieces_of = extended
    old, now = tokenizer.get_vocab(), new.get_vocab()
    assert {token: now[token] for token in old} == old
    assert list(pieces_of) == list(range(len(old), len(old) + len(pieces_of)))
    assert len(pieces_of) == sum(len(vocabulary.pieces(tokenizer, f" {term}")) - 1 for term in TERMS)


def test_new_entries_replace_the_old_pieces(extended, tokenizer):
    new, pieces_of = extended
    for term in TERMS:
        (new_id,) = new(f" {term}").input_ids
        assert pieces_of[new_id] == tokenizer(f" {term}").input_ids
    for new_id, ids in pieces_of.items():
        assert new.decode([new_id]) == tokenizer.decode(ids)


def test_a_tokenizer_of_another_kind_is_refused():
    """Mistral 7B's and Gemma's kind: a BPE whose entries are characters, with a sign for the space."""
    entries = ["<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(BPE({entry: i for i, entry in enumerate(entries)}, [], unk_token="<unk>"))
    backend.normalizer = Replace(" ", "▁")
    for tokenizer in (PreTrainedTokenizerFast(tokenizer_object=backend), object()):
        with pytest.raises(SystemExit, match="not byte-level BPE"):
            vocabulary.check_kind(tokenizer, "other")


def test_text_round_trips_and_term_free_text_keeps_its_ids(extended, tokenizer):
    new, _ = extended
    for text in MIXED:
        assert new.decode(new(text).input_ids) == text
        assert len(new(text).input_ids) <= len(tokenizer(text).input_ids)
    for text in MIXED[2:3] + MIXED[6:]:
        assert new(text).input_ids == tokenizer(text).input_ids


def test_saved_and_opened_by_the_plain_library_it_is_the_same(extended, tokenizer, tmp_path):
    new, _ = extended
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(t).input_ids for t in MIXED] == [new(t).input_ids for t in MIXED]
    assert again.chat_template == tokenizer.chat_template and again.pad_token == tokenizer.pad_token
    assert new.padding_side == tokenizer.padding_side and new.name_or_path == tokenizer.name_or_path


def test_special_tokens_behind_the_vocabulary_keep_their_ids(tokenizer):
    """As in Llama 3 and Qwen: they are added tokens only, with ids where new entries would go."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|behind|>"]})
    behind = other.convert_tokens_to_ids("<|behind|>")
    assert behind == len(tokenizer)
    new, pieces_of = vocabulary.extend(other, ["NetworkX"])
    assert new.convert_tokens_to_ids("<|behind|>") == behind
    assert list(pieces_of) == [behind + 1]
    assert new("<|behind|> NetworkX").input_ids == [behind, behind + 1]


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_a_tokenizer_of_its_own_class_is_extended_and_saved_as_such(tokenizer, tmp_path, kind):
    """transformers 5 builds some classes anew from entries and merges, and reads no more of the file."""
    tokenizer.save_pretrained(tmp_path / "old")
    settings = tmp_path / "old" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": kind}))
    old = AutoTokenizer.from_pretrained(tmp_path / "old")
    vocabulary.check_kind(old, "old")
    new, pieces_of = vocabulary.extend(old, TERMS)
    new.save_pretrained(tmp_path / "new")
    again = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert type(again) is type(old)
    for text in MIXED:
        assert again(text).input_ids == new(text).input_ids
    for term in TERMS:
        (found,) = again(f" {term}").input_ids
        assert found in pieces_of


def test_terms_that_contain_each_other_are_all_one_token(tokenizer):
    terms = ["MultiDiGraph", "DiGraph", "estimators", "estimator", "MultiDi"]
    new, pieces_of = vocabulary.extend(tokenizer, terms)
    for term in terms:
        (new_id,) = new(f" {term}").input_ids
        assert pieces_of[new_id] == tokenizer(f" {term}").input_ids


@pytest.mark.parametrize(("terms", "reason"), [
    (["graph"], "in the vocabulary already, as 'Ġgraph'"), (["T-cell"], "always splits it: ĠT | - | cell"),
    (["two words"], "always splits it"),
    (["NetworkX", "NetworkX"], "term 'NetworkX': stands twice"),
    ([" NetworkX"], "term ' NetworkX': cannot be one token"),
    ([""], "term '': is in the vocabulary already, as 'Ġ'")])
def test_terms_that_cannot_be_are_refused_in_one_line(tokenizer, terms, reason):
    with pytest.raises(SystemExit) as error:
        vocabulary.check_terms(tokenizer, terms)
    assert reason in str(error.value) and "\n" not in str(error.value)


SENTENCES = ["The NetworkX library", "a graph, undirected, of nodes", "Сегодня крипта выросла",
             "Наша айтишка и крипта", "an estimator fits", "at Chebyshev nodes"]


@pytest.fixture(scope="module")
def ways(tokenizer, extended):
    return vocabulary.ways(tokenizer, TERMS, extended[0])


def count(way):
    """(sentences that round-trip, sentences in which every term is one token and no blank stands alone)."""
    whole = sum(way.decode(way(s).input_ids) == s for s in SENTENCES)
    one = 0
    for s in SENTENCES:
        found = [way.decode([i]) for i in way(s).input_ids]
        one += " " not in found and all(any(t.strip() == term for t in found) for term in TERMS if term in s)
    return whole, one


def test_only_vocabulary_entries_round_trip_and_are_one_token_in_all_sentences(ways):
    n = len(SENTENCES)
    assert count(ways["entry and merges"]) == (n, n)
    others = [name for name in ways if name not in ("entry and merges", "AddedToken with space")]
    assert len(others) == 4 and all(count(ways[name]) != (n, n) for name in others)


def test_what_each_added_token_does_wrong(ways):
    assert "Ġ" in vocabulary.pieces(ways["AddedToken"], "The NetworkX library")  # a space of its own
    assert "NetworkX" in vocabulary.pieces(ways["AddedToken"], "MyNetworkXs")  # fires inside words
    lost = ways["AddedToken lstrip"]
    assert lost.decode(lost("The NetworkX library").input_ids) == "TheNetworkX library"  # the space is gone
    never = ways["AddedToken with space, single_word"]
    assert " NetworkX" not in vocabulary.pieces(never, "The NetworkX library")  # does not fire after a letter
    assert " estimator" in vocabulary.pieces(ways["AddedToken with space"], "the estimators")  # too early
