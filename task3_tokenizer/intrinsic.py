"""What a row looks like from inside: cosine to words it should be near, to words it should not, its neighbours, its norm.

All cosines are mean-centred: rows of a language model share a large common direction, which makes any two of them look alike (Mu &
Viswanath 2018, "All-but-the-Top"). Anchors must not be among the pieces a row was initialised from, whose similarity comes for free.
"""

from __future__ import annotations

import random

import torch

N_RANDOM = 1000  # words that a cosine is ranked among


def centred(matrix: torch.Tensor) -> torch.Tensor:
    """Rows (vocabulary, hidden) in fp32 less their mean, at unit length: a product of two rows is their centred cosine."""
    matrix = matrix.detach().float()
    return torch.nn.functional.normalize(matrix - matrix.mean(0), dim=1)


def whole_words(tokenizer) -> dict[int, str]:
    """{id: word} of entries that are a blank and at least three letters."""
    blank = tokenizer.convert_ids_to_tokens(tokenizer(" ", add_special_tokens=False).input_ids)[0]
    entries = {i: tokenizer.convert_tokens_to_string([t])[1:] for t, i in tokenizer.get_vocab().items() if t.startswith(blank)}
    return {i: word for i, word in entries.items() if len(word) > 2 and word.isalpha()}


def against_words(units: torch.Tensor, row: int, ids: list[int], among: torch.Tensor) -> tuple[float, float]:
    """(mean cosine of `row` to rows `ids`, mean share of the words `among` that are less similar to it)."""
    cosines, others = units[ids] @ units[row], units[among] @ units[row]
    return cosines.mean().item(), (others[None] < cosines[:, None]).float().mean().item()


def neighbours(units: torch.Tensor, row: int, words: dict[int, str], k: int = 10) -> list[str]:
    """The k words whose rows are nearest to `row`."""
    near = (units @ units[row]).argsort(descending=True).tolist()
    return [words[i] for i in near if i in words and i != row][:k]


def look(model, tokenizer, terms: list[dict], new: dict[str, int], words: dict[int, str], seed: int) -> list[dict]:
    """Per side and term {"side", "term", "anchors", "negatives" (cosines), "anchor_rank", "negative_rank" (shares of random words below),
    "norm" (over the median), "neighbours"}; cosines are None for a term without anchors."""
    # drawn among old words: the same ones for every stage and both matrices
    among = torch.tensor(random.Random(seed).sample(sorted(words), min(N_RANDOM, len(words))), device=model.device)
    found = []
    for side, matrix in (("input", model.get_input_embeddings().weight), ("output", model.get_output_embeddings().weight)):
        units, norms = centred(matrix), matrix.detach().float().norm(dim=1)
        for term in terms:
            row, item = new[term["term"]], {"side": side, "term": term["term"]}
            for kind, name, rank in (("anchors", "anchors", "anchor_rank"), ("negative_anchors", "negatives", "negative_rank")):
                ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in term[kind]]
                item[name], item[rank] = against_words(units, row, ids, among) if ids else (None, None)
            found.append(item | {"norm": (norms[row] / norms.median()).item(), "neighbours": neighbours(units, row, words)})
    return found


def against_truth(matrix: torch.Tensor, ids: list[int], rows: torch.Tensor, words: dict[int, str]) -> list[dict]:
    """How near `rows` (len(ids), hidden) are to the true rows `ids` of `matrix`: {"cosine", "rank" of the true row among all (1 = nearest),
    "overlap" (share of the true row's ten nearest words among this row's)} per row."""
    matrix = matrix.detach().float()
    units = centred(matrix)
    given = torch.nn.functional.normalize(rows.to(matrix) - matrix.mean(0), dim=1)
    found = []
    for i, own in zip(ids, given):
        cosines = units @ own
        near = [j for j in cosines.argsort(descending=True).tolist() if j in words and j != i][:10]
        true = [j for j in (units @ units[i]).argsort(descending=True).tolist() if j in words and j != i][:10]
        found.append({"cosine": cosines[i].item(), "rank": int((cosines > cosines[i]).sum()) + 1, "overlap": len({*near} & {*true}) / 10})
    return found
