"""A start for new input rows that the model understands as it did the old pieces (Token Distillation, Dobler
et al. 2025, arXiv:2505.20133)."""

from __future__ import annotations

import torch
from torch.nn import functional

from common import models
from task3_tokenizer import embeddings, task

RATE, BATCH = 1e-2, 16


def pairs(rows: list[dict], old, new) -> list[tuple]:
    """(ids by the old tokenizer, by the new one, n) of windows around a term.

    Their last n tokens, from the term's last one on, are the same but for the term.
    """
    found = []
    for row in rows:
        (before, there), (after, here) = (task.encode(tokenizer, row) for tokenizer in (old, new))
        if before[there[1]:] == after[here[1]:]:  # else another term follows
            found.append((before, after, 1 + len(before) - there[1]))
    return found


def fit(model, ids: list[int], rows: list[dict], old, new, compute: str, epochs: int = 1) -> list[float]:
    """Fit the input rows `ids` of a model: when it reads a window with the new token, its last hidden states
    shall be those it had with the old pieces. Returns the mean squared error of each step.

    Only tokens that stand in a window move. Output rows stay, unless the model is tied: they are the same.
    """
    plain, texts, start = embeddings.both(model), pairs(rows, old, new), task.start_ids(old)
    (values, *_), _ = embeddings.train_rows(model, ids)
    starts = epochs * [*range(0, len(texts), BATCH)]
    optimizer = torch.optim.Adam([values], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(starts))
    decoder, losses = model.get_decoder(), []

    def states(lines, counts):
        inputs = task.padded([start + line for line in lines], old.pad_token_id, "left").to(model.device)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with models.autocast(compute):
            hidden = decoder(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        return torch.cat([line[-n:] for line, n in zip(hidden.float(), counts)])

    for first in starts:
        before, after, counts = zip(*texts[first:first + BATCH])
        with torch.no_grad():
            target = states(before, counts)
        loss = functional.mse_loss(states(after, counts), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.set_input_embeddings(plain[0])
    model.set_output_embeddings(plain[1])
    with torch.no_grad():
        plain[0].weight[torch.tensor(ids, device=model.device)] = values.detach().to(plain[0].weight)
    return losses
