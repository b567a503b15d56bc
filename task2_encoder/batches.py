"""Task 2's engine room: which pairs stand together in a batch, and how many of them are computed at once."""

from __future__ import annotations

import random

from accelerate.utils import gather_object
from sentence_transformers.util import batch_to_device

from common import models, training
from task2_encoder import task


def token_lengths(model, rows: list) -> list[tuple]:
    """Tokens that the model reads of each row's (anchor, positive), with their prompts."""
    limits, lengths = dict(truncation=True, max_length=model.max_seq_length), {}
    for side, kind in task.SIDES.items():
        texts = list(dict.fromkeys(row[side] for row in rows))
        ids = model.tokenizer([model.prompts[kind] + text for text in texts], **limits).input_ids
        lengths[side] = dict(zip(texts, map(len, ids)))
    return [tuple(lengths[side][row[side]] for side in task.SIDES) for row in rows]


def schedule(rows: list, lengths: list[tuple], cfg) -> list[list[int]]:
    """Indices of every step's batch: epochs of shuffled batches of similar length, in which no group stands
    twice.

    `rows`: {"group", "package"}; `lengths`: tokens of their (anchor, positive). Rows of a span of
    `cfg.bucket` batches are sorted by package (if `cfg.within_package`) and the positive's length, runs of 4
    batches again by the anchor's, so that both columns pad little; then the batches of a span are shuffled.
    Rows that fill no batch are left to the next epoch's draw. SystemExit if not even one batch can be filled.
    """
    rng, size, batches = random.Random(cfg.seed), cfg.batch_size, []

    def place(i):
        return rows[i]["package"] if cfg.within_package else "", lengths[i][1]

    while len(batches) < cfg.max_steps:
        before, order = len(batches), rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), cfg.bucket * size):
            span, filled = sorted(order[start:start + cfg.bucket * size], key=place), []
            for first in range(0, len(span), 4 * size):
                run = sorted(span[first:first + 4 * size], key=lambda i: lengths[i][0])
                filled += cut_by_group(run, rows, size)
            batches += rng.sample(filled, len(filled))
        if len(batches) == before:
            raise SystemExit(f"no {size} of {len(rows)} rows to train on belong to different groups: lower "
                             "SET=batch_size=..")
    return batches[:cfg.max_steps]


def cut_by_group(order: list[int], rows: list, size: int) -> list[list[int]]:
    """Full batches of `size`, in order; a row whose group the batch already holds waits for the next."""
    batches = []
    while len(order) >= size:
        batch, groups, waiting = [], set(), []
        for i in order:
            if len(batch) < size and rows[i]["group"] not in groups:
                batch.append(i)
                groups.add(rows[i]["group"])
            else:
                waiting.append(i)
        if len(batch) < size:
            break
        batches.append(batch)
        order = waiting
    return batches


def rows_at_once(model, cfg, rows: list, lengths: list[tuple], batch: int) -> tuple[int, int]:
    """How many of the `batch` rows of a process are computed at once, and the predicted peak in bytes.

    Forward passes of the longest row, once and twice, show what a row adds; half as many are tried until they
    fit. Predicted for 8, 16 and 32 pairs of 128 tokens (embedded-minilm, CPU) were 1.07, 1.32 and 1.83 GiB,
    measured 1.08, 1.24 and 1.73. What oneDNN keeps on a CPU for each width of a batch is left out: 0.7 GiB
    with 4 of 32 rows at once.
    """
    longest = rows[max(range(len(rows)), key=lambda i: sum(lengths[i]))]

    def activations(n: int) -> int:
        sides = [batch_to_device(model.preprocess([longest[side]] * n, prompt=model.prompts[kind]),
                                 model.device) for side, kind in task.SIDES.items()]
        arithmetic = models.arithmetic(cfg.precision, cfg.compute)
        return training.saved_bytes(model, lambda: [model(side) for side in sides], arithmetic)["activations"]

    one, two = activations(1), activations(2)

    def predicted(n: int) -> dict:
        return training.predict(model, activations=one + (n - 1) * (two - one))

    free, chosen = models.free_memory(cfg.memory_gib), batch
    while chosen > 1 and not training.fits(predicted(chosen), free):
        chosen //= 2
    chosen = min(gather_object([chosen]))  # processes exchange embeddings: all compute as many at once
    chosen = min(cfg.rows_per_pass, batch) or chosen
    return chosen, predicted(chosen)["total"]
