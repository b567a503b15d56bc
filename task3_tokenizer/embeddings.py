"""Rows of the two matrices that know words: initialised from old ones, trained on their own, compared with others.

A causal model has an input embedding (token -> vector) and an output head (vector -> logit per token), each a matrix of (vocabulary,
hidden). In SmolLM2 they are one tensor ("tied"); `untie` makes them two.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def untie(model) -> None:
    """Give the output head a matrix of its own, at first equal to the input's, and say so in the config."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # what transformers 5 drops from a checkpoint as a copy of something else


INITS = ("mean of pieces", "random", "vocabulary mean", "last and first piece", "weighted pieces")


def initial(matrix: torch.Tensor, splits: list[list[int]], method: str, side: str, seed: int = 0) -> torch.Tensor:
    """First values, (len(splits), hidden) in fp32, of new rows of the "input" or "output" matrix (vocabulary, hidden).

    "mean of pieces" (FVT, Gee et al. 2022); "random": a normal with the vocabulary's mean and deviation per dimension; "vocabulary
    mean" (Hewitt 2021; all rows equal); "last and first piece": the last for the input, whose state a causal model reads on, the
    first for the output, which has to be predicted; "weighted pieces": means with weights exp(2k) and exp(-2k), between the two
    (AdaptiVocab, Nakash et al. 2025). ValueError for another method.
    """
    matrix = matrix.detach().float()
    if method == "random":
        generator = torch.Generator().manual_seed(seed + (side == "output"))
        noise = torch.randn(len(splits), matrix.shape[1], generator=generator).to(matrix.device)
        return matrix.mean(0) + matrix.std(0) * noise
    if method == "vocabulary mean":
        return matrix.mean(0).repeat(len(splits), 1)
    if method == "mean of pieces":
        return torch.stack([matrix[ids].mean(0) for ids in splits])
    if method == "last and first piece":
        return torch.stack([matrix[ids[-1 if side == "input" else 0]] for ids in splits])
    if method == "weighted pieces":
        sign = 2.0 if side == "input" else -2.0
        return torch.stack([(sign * torch.arange(len(ids), device=matrix.device)).softmax(0) @ matrix[ids] for ids in splits])
    raise ValueError(f"init {method!r}: one of {', '.join(INITS)}")


@torch.no_grad()
def initialise(model, splits: dict[int, list[int]], method: str, seed: int, old: list | None = None) -> None:
    """Write the first values of the new rows `splits` {id: ids of its pieces} into the model.

    They are made of `old`, an input and an output matrix, or else of the model's own. A head's bias gets the
    mean of the pieces' biases: with the mean of their rows, a new logit is then the mean of its pieces'
    logits.
    """
    head, pieces = model.get_output_embeddings(), list(splits.values())
    old = old or [model.get_input_embeddings().weight, head.weight]
    rows = [initial(matrix, pieces, method, side, seed) for side, matrix in zip(("input", "output"), old)]
    write_rows(model, list(splits), rows)
    if head.bias is not None:
        head.bias[list(splits)] = torch.stack([head.bias[ids].float().mean() for ids in pieces]).to(head.bias)


class RowEmbedding(nn.Module):
    """An embedding whose rows `ids` are a parameter of their own, in fp32; the matrix is a buffer, or with `whole` a second parameter.

    What is no parameter cannot be moved by weight decay, momentum or clipping. Gemma's embedding multiplies
    each vector by a scale after the look-up, and so does this one.
    `forward`: (rows, columns) ids -> (rows, columns, hidden).
    """

    def __init__(self, embedding: nn.Embedding, ids: list[int], whole: bool = False):
        super().__init__()
        weight = embedding.weight
        self.scale = getattr(embedding, "embed_scale", None)
        place = torch.full((len(weight),), -1, device=weight.device)
        place[torch.tensor(ids)] = torch.arange(len(ids), device=weight.device)
        self.register_buffer("place", place, persistent=False)
        self.dtype = weight.dtype
        self.weight = nn.Parameter(weight.detach().float()) if whole else nn.Buffer(weight.detach(), persistent=False)
        self.rows = nn.Parameter(weight.detach()[torch.tensor(ids)].float())

    def forward(self, ids):
        place = self.place[ids]
        own = self.rows[place.clamp(min=0)]
        old = functional.embedding(ids, self.weight)
        found = torch.where((place >= 0)[..., None], own, old).to(self.dtype)
        return found if self.scale is None else found * torch.as_tensor(self.scale, dtype=self.dtype)


class RowHead(nn.Module):
    """An output head made in the same way; `shared` is the embedding of a tied model, whose parameters it then uses.

    Frozen rows cost no weight gradient: for 50k tokens that is a third of the head. A bias stays as it is.
    `forward`: (..., hidden) -> (..., vocabulary).
    """

    def __init__(self, head: nn.Linear, ids: list[int], whole: bool, shared: RowEmbedding | None):
        super().__init__()
        weight = head.weight
        self.bias = None if head.bias is None else nn.Buffer(head.bias.detach(), persistent=False)
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        if shared is not None:
            self.weight, self.rows = shared.weight, shared.rows
        else:
            self.weight = nn.Parameter(weight.detach().float()) if whole else nn.Buffer(weight.detach(), persistent=False)
            self.rows = nn.Parameter(weight.detach()[self.ids].float())

    def forward(self, hidden):
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        own = functional.linear(hidden, self.rows.to(hidden.dtype), None if bias is None else bias[self.ids])
        return functional.linear(hidden, self.weight.to(hidden.dtype), bias).index_copy_(-1, self.ids, own)


def train_rows(model, ids: list[int], whole: bool = False) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Freeze the model but the rows `ids` of both matrices and, with `whole`, these matrices.

    Returns (rows, matrices) to train, each of input and output, or one of each if the model is tied. Rows
    are in the order of `ids`. Such a row in the matrix is not used any more: `write_rows` puts the trained
    one over it.
    """
    model.requires_grad_(False)
    inner = RowEmbedding(model.get_input_embeddings(), ids, whole)
    shared = inner if model.config.tie_word_embeddings else None
    outer = RowHead(model.get_output_embeddings(), ids, whole, shared)
    model.set_input_embeddings(inner)
    model.set_output_embeddings(outer)
    return list(dict.fromkeys((inner.rows, outer.rows))), list(dict.fromkeys((inner.weight, outer.weight))) if whole else []


@torch.no_grad()
def write_rows(model, ids: list[int], rows: list[torch.Tensor], matrices: list[torch.Tensor] = ()) -> None:
    """Put `matrices` (vocabulary, hidden), if given, and over them rows (len(ids), hidden), in the order of
    `ids`, into the input and, if there are two, the output matrix of a plain model."""
    where = torch.tensor(ids, device=model.device)
    plain = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for matrix, values in zip(plain, matrices):
        matrix.copy_(values)
    for matrix, values in zip(plain, rows):
        matrix[where] = values.to(matrix)


def changes(before: list[torch.Tensor], after: list[torch.Tensor], ids: list[int]) -> dict:
    """What became of the (input, output) matrices: largest and mean movement of all rows but `ids`, and the norms of these rows."""
    found = {}
    for side, old, new in zip(("input", "output"), before, after):
        old, new = old.detach().float(), new.detach().float()
        others = torch.ones(len(new), dtype=torch.bool, device=new.device)
        others[list(ids)] = False
        moved = (new - old)[others].abs()
        found |= {f"{side}_largest_change_of_other_rows": moved.max().item(), f"{side}_mean_change_of_other_rows": moved.mean().item(),
                  f"{side}_rows_identical": bool((moved == 0).all()),
                  f"{side}_median_norm": new.norm(dim=1).median().item(), f"{side}_trained_norm": new[list(ids)].norm(dim=1).mean().item()}
    return found
