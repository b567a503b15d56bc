"""New words as real entries of a byte-level BPE vocabulary: an id for `Ġterm` and the merges that lead to it.

No AddedToken does this for an ordinary word, because they are cut out of the raw text before
pre-tokenisation. A plain one also matches inside longer words and leaves the space before it as a token of
its own; `lstrip` removes that space and decoding does not bring it back; " term" with `single_word` never
matches inside a sentence. `ways` builds them all, and tests/test_vocabulary.py shows what each does.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer


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
        if not term or term != term.strip():
            raise SystemExit(f"{where}: empty, or with spaces around it; write the bare word")
        if terms.count(term) > 1:
            raise SystemExit(f"{where}: stands twice in the list")
        words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(f" {term}")
        if len(words) != 1:
            raise SystemExit(f"{where}: cannot be one token, the pre-tokenizer always splits it: "
                             + " | ".join(word for word, _ in words))
        if len(entries := pieces(tokenizer, f" {term}")) == 1:
            raise SystemExit(f"{where}: is in the vocabulary already, as {entries[0]!r}")


def extend(tokenizer, terms: list[str]):
    """(tokenizer with one id for each " term", {entry: {"id", "term" or None, "left", "right"}} of what was
    added).

    A word of k pieces needs k - 1 merges, which join its present pieces from left to right, and k - 2 entries
    in between. They come after all old merges, so text without a new word keeps its ids. A term whose pieces
    an earlier term changed is built on the changed ones. Entries are in the order of their ids. SystemExit as
    in `check_terms`; AssertionError if an old id moved or a term is not one token in the end.
    """
    check_terms(tokenizer, terms)
    old, state, added = tokenizer.get_vocab(), json.loads(tokenizer.backend_tokenizer.to_str()), {}
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for special in state["added_tokens"]:  # Llama 3 and Qwen have them where ours would go
        vocabulary.setdefault(special["content"], special["id"])
    following = 1 + max(old.values())
    for term in terms:
        present = Tokenizer.from_str(json.dumps(state))
        left, *others = present.encode(f" {term}", add_special_tokens=False).tokens
        for right in others:
            if left + right not in vocabulary:  # an entry in between may exist already, also of another term
                vocabulary[left + right] = following
                added[left + right] = {"id": following, "term": None, "left": left, "right": right}
                following += 1
            merges.append([left, right])
            left += right
        added.setdefault(left, {"id": vocabulary[left], "left": None, "right": None})["term"] = term
    new = _with_state(tokenizer, state)
    now = new.get_vocab()
    assert all(now[token] == i for token, i in old.items()), "an old id moved"
    assert all(len(pieces(new, f" {term}")) == 1 for term in terms), "a term is not one token"
    return new, added


def pieces_of(added: dict, vocabulary: dict[str, int]) -> dict[int, list[int]]:
    """{new id: the old ids that it replaces}, from what `extend` returned and the old vocabulary."""
    def split(entry):
        if entry in vocabulary:
            return [vocabulary[entry]]
        return split(added[entry]["left"]) + split(added[entry]["right"])
    return {what["id"]: split(entry) for entry, what in added.items()}


def _with_state(tokenizer, state: dict):
    """The same tokenizer (template, special tokens, padding) around another tokenizer.json."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        new = AutoTokenizer.from_pretrained(folder, padding_side=tokenizer.padding_side)
    new.name_or_path = tokenizer.name_or_path  # else it is the temporary folder's
    return new


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
