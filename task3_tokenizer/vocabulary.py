"""New words as real entries of a byte-level BPE vocabulary: an id for `Ġterm` and the merges that lead to it, old ids unchanged.

No AddedToken does this for an ordinary word. They are cut out of the raw text before pre-tokenisation, so a plain one also fires inside
longer words and leaves the blank before it as a token of its own, `lstrip` eats the blank and does not give it back, and " term" with
`single_word` never fires inside a sentence. `variants` builds them all, tests/test_vocabulary.py shows what each does.
"""

from __future__ import annotations

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
    kind = type(tokenizer).__name__  # of one that is not the tokenizers library's
    if hasattr(tokenizer, "backend_tokenizer"):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        kind = state["model"]["type"]
        if kind == "BPE":
            if "ByteLevel" in json.dumps(state["pre_tokenizer"]):
                return
            kind = "BPE over characters, as SentencePiece makes it"
    raise SystemExit(f"MODEL={name}: its tokenizer is {kind}, not byte-level BPE (GPT-2's, Llama 3's, "
                     "Qwen's, SmolLM2's kind), which the merges of new words need")


def check_terms(tokenizer, terms: list[str]) -> None:
    """SystemExit for what cannot become one new token, with the term and the reason."""
    seen = set()
    for number, term in enumerate(terms, 1):
        where = f"term {number} {term!r}"
        if not term or term != term.strip():
            raise SystemExit(f"{where}: empty, or with blanks around it; write the bare word")
        if term in seen:
            raise SystemExit(f"{where}: stands twice in the list")
        seen.add(term)
        parts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(f" {term}")
        if len(parts) != 1:
            cut = ", ".join(repr(f" {term}"[start:end]) for _, (start, end) in parts)
            raise SystemExit(f"{where}: cannot be one token, the tokenizer cuts it into {cut} before it looks at the vocabulary")
        if len(found := pieces(tokenizer, f" {term}")) == 1:
            raise SystemExit(f"{where}: is in the vocabulary already, as {found[0]!r}")


def extend(tokenizer, terms: list[str]):
    """(tokenizer with one id for " term" each, {entry: {"id", "term" or None, "left", "right"}} of what was added, in order of ids).

    A word of k pieces needs k - 1 merges, which join its present pieces from left to right, and k - 2 entries in between; they are added
    below all old merges, so text in which no new pair meets keeps its ids. A term whose pieces an earlier term changed is built on the
    changed ones. SystemExit as in `check_terms`; AssertionError if an old id moved or a term is not one token in the end.
    """
    check_terms(tokenizer, terms)
    old, state, added = tokenizer.get_vocab(), json.loads(tokenizer.backend_tokenizer.to_str()), {}
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for special in state["added_tokens"]:  # in Llama 3 and Qwen they stand behind the vocabulary, and would be numbered anew behind ours
        vocabulary.setdefault(special["content"], special["id"])
    following = 1 + max(old.values())
    for term in terms:
        left, *others = Tokenizer.from_str(json.dumps(state)).encode(f" {term}", add_special_tokens=False).tokens
        for right in others:
            if left + right not in vocabulary:  # an entry in between may be there already, unreachable or shared by two terms
                vocabulary[left + right] = following
                added[left + right] = {"id": following, "term": None, "left": left, "right": right}
                following += 1
            merges.append([left, right])
            left += right
        added.setdefault(left, {"id": vocabulary[left], "left": None, "right": None})["term"] = term
    new = _with_state(tokenizer, state)
    now = new.get_vocab()
    assert all(now[token] == i for token, i in old.items()), "an old id moved"
    assert len(now) == 1 + max(now.values()), "ids have a gap"
    for term in terms:
        assert len(pieces(new, f" {term}")) == 1, f"{term!r} is not one token"
    return new, added


def spell(added: dict, vocabulary: dict[str, int]) -> dict[int, list[int]]:
    """{new id: the old ids it is made of} from what `extend` returned and the old vocabulary."""
    def cut(entry):
        return [vocabulary[entry]] if entry in vocabulary else cut(added[entry]["left"]) + cut(added[entry]["right"])
    return {what["id"]: cut(entry) for entry, what in added.items()}


def _with_state(tokenizer, state: dict):
    """The same tokenizer (template, special tokens, padding) around another tokenizer.json."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        new = AutoTokenizer.from_pretrained(folder, padding_side=tokenizer.padding_side)
    new.name_or_path = tokenizer.name_or_path  # else the temporary folder's
    return new


def variants(tokenizer, terms: list[str], extended) -> dict:
    """{name: tokenizer} of every way to add `terms`.

    AddedToken with each combination people use; vocabulary entry with merges, which is `extended`, made by
    `extend`; and vocabulary entry found by `ignore_merges` (whole pre-tokens are looked up first).
    """
    def fresh():
        return _with_state(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()))

    built, lstrip, single = {}, {"lstrip": True}, {"single_word": True}
    for name, blank, options in (("AddedToken", "", {}), ("AddedToken lstrip", "", lstrip), ("AddedToken single_word", "", single),
                                 ("AddedToken with blank", " ", {}), ("AddedToken with blank, single_word", " ", single)):
        built[name] = fresh()
        built[name].add_tokens([AddedToken(blank + term, normalized=False, **options) for term in terms])
    built["entry and merges"] = extended
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = {term: tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(f" {term}")[0][0] for term in terms}
    following = 1 + max(tokenizer.get_vocab().values())
    for special in state["added_tokens"]:
        state["model"]["vocab"].setdefault(special["content"], special["id"])
    state["model"]["vocab"] |= {entry: following + i for i, entry in enumerate(byte_level.values())}
    state["model"]["ignore_merges"] = True
    built["entry and ignore_merges"] = _with_state(tokenizer, state)
    return built


def without(tokenizer, words: list[str]):
    """The tokenizer as if it had never learnt " word": merges that make or use these entries are gone, ids are as they were."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    hidden = {entry for word in words for entry in pieces(tokenizer, f" {word}")}
    state["model"]["ignore_merges"] = False  # Llama 3 looks up whole words first
    state["model"]["merges"] = [m for m in state["model"]["merges"] if not hidden & {m[0], m[1], m[0] + m[1]}]
    return _with_state(tokenizer, state)
