"""Task 2's engine room: which pairs stand together in a batch, and how many of them are computed at once."""

from __future__ import annotations

import random

from accelerate.utils import gather_object
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.util import batch_to_device

from common import models, training


def schedule(rows: list[dict], lengths: list[tuple[int, int]], cfg) -> list[list[int]]:
    """Indices of every step's batch: epochs of shuffled batches of similar length, in which no group stands twice.

    `rows`: {"group", "package"}; `lengths`: tokens of their (anchor, positive). Rows of a span of `cfg.bucket`
    batches are sorted by package (if `cfg.same_package`) and the positive's length, runs of 4 batches again by
    the anchor's, so that both columns pad little; then the batches of a span are shuffled. Rows that fill no
    batch are left to the next epoch's draw. ValueError if not even one batch can be filled.
    """
    rng, size, batches = random.Random(cfg.seed), cfg.batch_size, []
    while len(batches) < cfg.max_steps:
        before, order = len(batches), rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), cfg.bucket * size):
            span = sorted(order[start:start + cfg.bucket * size],
                          key=lambda i: (rows[i]["package"] if cfg.same_package else "", lengths[i][1]))
            filled = []
            for first in range(0, len(span), 4 * size):
                run = sorted(span[first:first + 4 * size], key=lambda i: lengths[i][0])
                filled += cut_by_group(run, rows, size)
            batches += rng.sample(filled, len(filled))
        if len(batches) == before:
            raise ValueError(f"no batch of {size} rows with {size} different groups among {len(rows)} rows")
    return batches[:cfg.max_steps]


def cut_by_group(order: list[int], rows: list[dict], size: int) -> list[list[int]]:
    """Full batches of `size`, in order; a row whose group the batch already holds waits for the next batch."""
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


class Scheduled(DefaultBatchSampler):
    """The batches of `schedule` as the library's batch sampler, so that resuming skips those already trained."""

    def __init__(self, batches: list[list[int]]):
        super().__init__(range(sum(map(len, batches))), batch_size=len(batches[0]), drop_last=False)
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def rows_at_once(model, cfg, longest: dict[str, str], batch: int, log) -> tuple[int, dict[str, int]]:
    """How many of the `batch` rows of a process are computed at once, and the predicted bytes of such a step.

    Forward passes of the longest query and document, once and twice, show what a row adds. A whole batch keeps
    both sides of its rows; fewer at once (CachedMultipleNegativesRankingLoss) keep one side. Predicted for 8,
    16 and 32 pairs of 128 tokens (embedded-minilm, CPU) were 1.07, 1.32 and 1.83 GiB, measured 1.08, 1.24 and
    1.73. What oneDNN keeps on a CPU for each width of a batch is left out: 0.7 GiB with 4 of 32 rows at once.
    SystemExit if not even one row fits.
    """
    def activations(kind: str, rows: int) -> int:
        features = model.preprocess([longest[kind]] * rows, prompt=model.prompts[kind])
        features = batch_to_device(features, model.device)
        arithmetic = models.arithmetic(cfg.precision, cfg.compute)
        return training.saved_bytes(model, lambda: model(features), arithmetic)["activations"]

    one, two = ([activations(kind, rows) for kind in longest] for rows in (1, 2))
    row = [b - a for a, b in zip(one, two)]
    constant = max(2 * a - b for a, b in zip(one, two))

    def predicted(rows: int) -> dict[str, int]:
        per_row = sum(row) if rows == batch else max(row)
        return training.predict(model, activations=constant + rows * per_row)

    free, gib = models.free_memory(cfg.memory_gib), 2**30
    sizes = [batch >> halvings for halvings in range(batch.bit_length())]
    fitting = max((rows for rows in sizes if training.fits(predicted(rows), free)), default=0)
    fitting = min(gather_object([fitting]))  # processes exchange embeddings: all compute as many at once
    rows = min(cfg.rows_per_pass, batch) or fitting
    if not rows:
        needed = predicted(1)["total"] - predicted(1)["resident"]
        raise SystemExit(f"one row at once needs {needed / gib:.2f} GiB more than is in use, {free / gib:.2f} are "
                         "free: a smaller MODEL= or fewer max_tokens; SET=rows_per_pass=1 tries all the same")
    log(rows_per_pass=rows, batch=batch, predicted_GiB=predicted(rows)["total"] / gib, free_GiB=free / gib)
    return rows, predicted(rows)
