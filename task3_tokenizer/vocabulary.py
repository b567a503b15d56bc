"""New words as real entries of a byte-level BPE vocabulary: an id for `Ġterm` and the merges that lead to it.

No AddedToken does this for an ordinary word, because they are cut out of the raw text before
pre-tokenisation. A plain one also matches inside longer words and leaves the space before it as a token of
its own; `lstrip` removes that space and decoding does not bring it back; " term" with `single_word` never
matches inside a sentence. `ways` builds them all, and tests/test_vocabulary.py shows what each does.
"""

from __future__ import annotations

import copy
import json

from tokenizers import Tokenizer
from transformers import AddedToken


def pieces(tokenizer, text: str) -> list[str]:
    """The vocabulary entries that `text` is made of."""
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


def check_kind(tokenizer, name: str) -> None:
    """SystemExit unless the tokenizer of the model `name` is byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(getattr(backend, "model", None)).__name__
    if kind != "BPE" or "ByteLevel" not in str(backend.pre_tokenizer):
        raise SystemExit(f"MODEL={name}: its tokenizer is not byte-level BPE (the kind of GPT-2, Llama 3 and "
                         "Qwen), which the merges of new words need")


def check_terms(tokenizer, terms: list[str]) -> None:
    """SystemExit for what cannot become one new token, with the term and the reason."""
    for term in terms:
        where = f"term {term!r}"
        if terms.count(term) > 1:
            raise SystemExit(f"{where}: stands twice in the list")
        words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(f" {term}")
        if len(words) != 1:
            raise SystemExit(f"{where}: cannot be one token, the pre-tokenizer always splits it: "
                             + " | ".join(word for word, _ in words))
        if len(entries := pieces(tokenizer, f" {term}")) == 1:
            raise SystemExit(f"{where}: is in the vocabulary already, as {entries[0]!r}")


def extend(tokenizer, terms: list[str]):
    """(tokenizer with one id for each " term", {new id: the old ids that it replaces}, in order of new ids).

    A word of k pieces needs k - 1 merges, which join its present pieces from left to right, and k - 2 entries
    in between, which get ids too. The merges come after all old ones, so text without a new word keeps its
    ids. A term whose pieces an earlier term changed is built on the changed ones. `terms` must have passed
    `check_terms`; AssertionError if an old id moved or a term is not one token in the end.
    """
    old, state, pieces_of = tokenizer.get_vocab(), json.loads(tokenizer.backend_tokenizer.to_str()), {}
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for special in state["added_tokens"]:  # Llama 3 and Qwen have them where ours would go
        vocabulary.setdefault(special["content"], special["id"])
    following = 1 + max(old.values())
    for term in terms:
        present = Tokenizer.from_str(json.dumps(state))
        left, *others = present.encode(f" {term}", add_special_tokens=False).tokens
        for right in others:
            if left + right not in vocabulary:  # an entry in between may exist already, also of another term
                joined = [vocabulary[left], vocabulary[right]]
                pieces_of[following] = [piece for i in joined for piece in pieces_of.get(i, [i])]
                vocabulary[left + right] = following
                following += 1
            merges.append([left, right])
            left += right
        pieces_of.setdefault(vocabulary[left], [vocabulary[left]])  # an old entry that no merge led to
    new = copy.deepcopy(tokenizer)  # template, special tokens and padding, around other entries and merges
    new._tokenizer = Tokenizer.from_str(json.dumps(state))
    now = new.get_vocab()
    assert all(now[token] == i for token, i in old.items()), "an old id moved"
    assert all(len(pieces(new, f" {term}")) == 1 for term in terms), "a term is not one token"
    return new, pieces_of


def ways(tokenizer, terms: list[str], extended) -> dict:
    """{name: tokenizer} of every way to add `terms`: AddedToken with each combination of options that people
    use, and entries with merges (`extended`, made by `extend`)."""
    built = {}
    for name, space, options in (("AddedToken", "", {}), ("AddedToken lstrip", "", {"lstrip": True}),
                                 ("AddedToken single_word", "", {"single_word": True}),
                                 ("AddedToken with space", " ", {}),
                                 ("AddedToken with space, single_word", " ", {"single_word": True})):
        built[name] = copy.deepcopy(tokenizer)
        built[name].add_tokens([AddedToken(space + term, normalized=False, **options) for term in terms])
    return built | {"entry and merges": extended}
