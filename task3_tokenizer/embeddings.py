"""The two matrices of a causal model, one row per token: new rows get first values, learn on their own, are
written back, and are compared with the rows of other words.

The input embedding (token -> vector) and the output head (vector -> logit per token) are matrices of
(vocabulary, hidden). In SmolLM2 they are one tensor ("tied"); `untie` makes them two.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

INITS = ("mean of pieces", "random", "vocabulary mean", "last and first piece", "weighted pieces",
         "distilled")


def both(model) -> tuple[nn.Module, nn.Module]:
    """(input embedding, output head)"""
    return model.get_input_embeddings(), model.get_output_embeddings()


def untie(model) -> None:
    """Give the output head a matrix of its own, at first equal to the input's, and say so in the config."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # transformers 5 leaves these out of a checkpoint, as copies


# -------------------------------------------------------------------------------------------- first values

def initial(matrix: torch.Tensor, pieces: list[list[int]], method: str, side: str,
            seed: int = 0) -> torch.Tensor:
    """First values, (len(pieces), hidden) in fp32, of new rows of the "input" or "output" matrix (vocabulary,
    hidden).

    "mean of pieces" (FVT, Gee et al. 2022); "random": a normal with the vocabulary's mean and deviation per
    dimension; "vocabulary mean" (Hewitt 2021; all rows equal); "last and first piece": the last for the
    input, where a causal model has read the whole word, the first for the output, which has to be predicted
    first; "weighted pieces": means with weights exp(2k) and exp(-2k), between the two (AdaptiVocab, Nakash et
    al. 2025); "distilled": as the mean, from which distil.py goes on. ValueError for another method.
    """
    matrix = matrix.detach().float()
    if method == "random":
        generator = torch.Generator().manual_seed(seed + (side == "output"))
        noise = torch.randn(len(pieces), matrix.shape[1], generator=generator).to(matrix.device)
        return matrix.mean(0) + matrix.std(0) * noise
    if method == "vocabulary mean":
        return matrix.mean(0).repeat(len(pieces), 1)
    if method in ("mean of pieces", "distilled"):
        return torch.stack([matrix[ids].mean(0) for ids in pieces])
    if method == "last and first piece":
        return torch.stack([matrix[ids[-1 if side == "input" else 0]] for ids in pieces])
    if method == "weighted pieces":
        sign = 2.0 if side == "input" else -2.0
        weights = [(sign * torch.arange(len(ids), device=matrix.device)).softmax(0) for ids in pieces]
        return torch.stack([weight @ matrix[ids] for weight, ids in zip(weights, pieces)])
    raise ValueError(f"init {method!r}: one of {', '.join(INITS)}")


@torch.no_grad()
def initialise(model, pieces_of: dict[int, list[int]], method: str, seed: int) -> None:
    """Write the first values of the new rows {id: ids of its pieces} into both matrices.

    A head's bias gets the mean of the pieces' biases: with the mean of their rows, a new logit is then the
    mean of its pieces' logits.
    """
    pieces, head = list(pieces_of.values()), model.get_output_embeddings()
    rows = [initial(layer.weight, pieces, method, side, seed)
            for side, layer in zip(("input", "output"), both(model))]
    write_rows(model, list(pieces_of), rows)
    if head.bias is not None:
        means = torch.stack([head.bias[ids].float().mean() for ids in pieces])
        head.bias[list(pieces_of)] = means.to(head.bias)


# ------------------------------------------------------------------------------------------------ training

def matrix_and_rows(weight: torch.Tensor, ids: list[int], whole: bool) -> tuple[torch.Tensor, nn.Parameter]:
    """(the matrix, a parameter in fp32 if `whole`, else a buffer; its rows `ids` as a parameter in fp32)"""
    matrix = nn.Buffer(weight, persistent=False)
    if whole:  # a copy, also of fp32: what it was before is asked for afterwards
        matrix = nn.Parameter(weight.to(torch.float32, copy=True))
    return matrix, nn.Parameter(weight[ids].float())


class RowEmbedding(nn.Module):
    """An embedding whose rows `ids` are a parameter of their own, in fp32; the matrix is a buffer, or with
    `whole` a second parameter. forward: (rows, columns) ids -> (rows, columns, hidden).

    Weight decay, momentum and clipping cannot move what is no parameter. Gemma's embedding multiplies each
    vector by a scale after the look-up, and so does this one.
    """

    def __init__(self, embedding: nn.Embedding, ids: list[int], whole: bool):
        super().__init__()
        weight = embedding.weight.detach()
        self.scale, self.dtype = getattr(embedding, "embed_scale", None), weight.dtype
        place = torch.full((len(weight),), -1, device=weight.device)
        place[torch.tensor(ids)] = torch.arange(len(ids), device=weight.device)
        self.register_buffer("place", place, persistent=False)  # of each id in `rows`; -1: in the matrix
        self.weight, self.rows = matrix_and_rows(weight, ids, whole)

    def forward(self, ids):
        place = self.place[ids]
        own, old = self.rows[place.clamp(min=0)], functional.embedding(ids, self.weight)
        vectors = torch.where((place >= 0)[..., None], own, old).to(self.dtype)
        return vectors if self.scale is None else vectors * torch.as_tensor(self.scale, dtype=self.dtype)


class RowHead(nn.Module):
    """An output head made in the same way; `shared` is the embedding of a tied model, whose parameters it
    then uses. forward: (..., hidden) -> (..., vocabulary).

    Frozen rows cost no weight gradient: with 50k tokens that is a third of the head's time. A bias stays as
    it is.
    """

    def __init__(self, head: nn.Linear, ids: list[int], whole: bool, shared: RowEmbedding | None):
        super().__init__()
        weight = head.weight.detach()
        self.bias = None if head.bias is None else nn.Buffer(head.bias.detach(), persistent=False)
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        own = (shared.weight, shared.rows) if shared else matrix_and_rows(weight, ids, whole)
        self.weight, self.rows = own

    def forward(self, hidden):
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        own = functional.linear(hidden, self.rows.to(hidden.dtype), None if bias is None else bias[self.ids])
        return functional.linear(hidden, self.weight.to(hidden.dtype), bias).index_copy_(-1, self.ids, own)


def train_rows(model, ids: list[int], whole: bool = False) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Freeze the model but the rows `ids` of both matrices and, with `whole`, these matrices.

    Returns (rows, matrices) to train, each of input and output, or one of each if the model is tied. Rows are
    in the order of `ids`. The matrix's own copy of such a row is not used any more: `write_rows` replaces it.
    """
    model.requires_grad_(False)
    inner = RowEmbedding(model.get_input_embeddings(), ids, whole)
    shared = inner if model.config.tie_word_embeddings else None
    outer = RowHead(model.get_output_embeddings(), ids, whole, shared)
    model.set_input_embeddings(inner)
    model.set_output_embeddings(outer)
    layers = [inner] if shared else [inner, outer]
    return [layer.rows for layer in layers], [layer.weight for layer in layers if whole]


@torch.no_grad()
def write_rows(model, ids: list[int], rows: list[torch.Tensor], matrices: list[torch.Tensor] = ()) -> None:
    """Write `matrices` (vocabulary, hidden), if given, and over them rows (len(ids), hidden), in the order of
    `ids`, into the input and, if there are two, the output matrix of a plain model."""
    where = torch.tensor(ids, device=model.device)
    for layer, values in zip(both(model), matrices):
        layer.weight.copy_(values)
    for layer, values in zip(both(model), rows):
        layer.weight[where] = values.to(layer.weight)


# ------------------------------------------------------------------------------------------------- cosines

def centred(matrix: torch.Tensor) -> torch.Tensor:
    """Rows (vocabulary, hidden) in fp32 minus their mean, at unit length: a product of two is their centred
    cosine.

    Rows of a language model share a large common direction, which makes any two of them look alike (Mu &
    Viswanath 2018, "All-but-the-Top").
    """
    matrix = matrix.detach().float()
    return functional.normalize(matrix - matrix.mean(0), dim=1)


def whole_words(tokenizer) -> dict[int, str]:
    """{id: word} of the entries that are a space and at least three letters."""
    space = tokenizer.convert_ids_to_tokens(tokenizer(" ", add_special_tokens=False).input_ids)[0]
    words = {i: tokenizer.convert_tokens_to_string([entry])[1:] for entry, i in tokenizer.get_vocab().items()
             if entry.startswith(space)}
    return {i: word for i, word in words.items() if len(word) > 2 and word.isalpha()}


def cosines(model, tokenizer, terms: list[dict], new_ids: dict[str, int],
            words: dict[int, str]) -> dict[str, list[dict]]:
    """{"input", "output": an item for each term}: id (the term), the mean cosine of its row to anchors, to
    negatives and the contrast between them, for a term that has such words, and the ten nearest of `words` as
    neighbours.

    Anchors should not be among the pieces that a row was initialised from, because that similarity comes for
    free.
    """
    sides = {}
    for side, layer in zip(("input", "output"), both(model)):
        units, sides[side] = centred(layer.weight), []
        for term in terms:
            row = new_ids[term["term"]]
            similar = units @ units[row]
            near = [words[i] for i in similar.argsort(descending=True).tolist() if i in words and i != row]
            item = {"id": term["term"], "neighbours": near[:10]}
            for name, column in (("anchors", "anchors"), ("negatives", "negative_anchors")):
                ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in term[column]]
                if ids:
                    item[name] = (units[ids] @ units[row]).mean().item()
            if {"anchors", "negatives"} <= set(item):
                item["contrast"] = item["anchors"] - item["negatives"]
            sides[side].append(item)
    return sides
