"""How many rows of a batch fit into the memory at once, and whether activations have to be computed twice."""

from __future__ import annotations

from typing import NamedTuple

from accelerate.utils import gather_object

from common import models, training
from task1_decoder import task

# Bytes of the backward pass for each logit, beside those that the forward pass saves: gradients and copies
# in fp32 and 16 bits. With it the peaks of 1.93B parameters in NF4 on an H100 were predicted as 5.4, 9.1,
# 16.6 and 61.5 GiB for 8, 16, 32 and 128 rows a pass, and measured as 5.6, 9.5, 17.3 and 63.9.
LOGIT_GRADIENT = 12


class Passes(NamedTuple):
    """How the rows of a batch are computed."""
    rows: int  # of one pass
    checkpointing: bool
    graphs: bool  # CUDA graphs repeat the passes
    shapes: tuple  # what task.collate rounds batches to, so that few graphs are recorded
    predicted: dict[str, int]  # as from `predict`


def choose(model, examples: list[dict], cfg, compute: str, pad_token_id: int) -> Passes:
    """The passes of a training on encoded `examples` that the knobs ask for, or that fit (see `plan`)."""
    graphs = (cfg.cuda_graphs and model.device.type == "cuda" and compute != "fp16"
              and training.PROCESSES == 1)
    shapes = (16, 1 + cfg.max_completion_tokens) if graphs else ()
    longest = sorted(examples, key=lambda example: -len(example["prompt"]) - len(example["answer"]))
    longest = task.collate(longest[:training.per_process(cfg.batch_size)], pad_token_id, *shapes)
    rows, checkpointing, predicted = plan(
        model, longest, compute, cfg.rows_per_pass, cfg.gradient_checkpointing, cfg.memory_gib,
        most=64 if graphs else None)  # more rows in a graph are no faster
    return Passes(rows, checkpointing, graphs and not checkpointing, shapes, predicted)


def per_row(model, longest: dict, compute: str) -> dict[str, int]:
    """Bytes of one row of the batch `longest` (from task.collate), from forward passes of one and two rows.

    {"activations", "logits", "inputs" (what checkpointing keeps of the layers), "constant" (does not grow
    with the rows), "layers" (their number)}.
    """
    rows, columns = longest["input_ids"].shape
    vocabulary = model.get_output_embeddings().weight.shape[0]
    config = model.config.get_text_config()

    def saved(n):
        batch = {k: v if k == "logits_to_keep" else v[:n].to(model.device) for k, v in longest.items()}
        return training.saved_bytes(model, lambda: model(**batch).loss, compute, vocabulary)
    one = saved(1)
    two = saved(2) if rows > 1 else {kind: 2 * size for kind, size in one.items()}
    row = {kind: two[kind] - one[kind] for kind in one}
    width = models.DTYPES[compute].itemsize * config.hidden_size * columns
    return {"activations": row["activations"], "inputs": width * config.num_hidden_layers,
            "logits": row["logits"] + LOGIT_GRADIENT * longest["logits_to_keep"] * vocabulary,
            "constant": max(0, one["activations"] - row["activations"]), "layers": config.num_hidden_layers}


def predict(model, row: dict, rows: int, checkpointing: bool) -> dict[str, int]:
    """Predicted bytes of a step of `rows` rows, as from training.predict, where `row` comes from per_row.

    With `checkpointing` the activations are those of one layer and the inputs of all.
    """
    activations = row["activations"]
    if checkpointing:
        activations = activations / row["layers"] + row["inputs"]
    return training.predict(model, activations=int(rows * activations) + row["constant"],
                            logits=rows * row["logits"])


def plan(model, longest: dict, compute: str, rows_per_pass: int, checkpointing: str, cap_gib: float,
         most: int | None = None):
    """(rows of one pass, whether to checkpoint, prediction) for a batch `longest`, in passes of `most` rows
    or fewer.

    `rows_per_pass` 0 and `checkpointing` "auto" leave the choice to the free memory (`cap_gib`: see
    models.free_memory). Fewer rows come before checkpointing down to an eighth of the batch: more passes cost
    less than computing everything twice. SystemExit with the predicted size if nothing fits.
    """
    batch = len(longest["input_ids"])
    if rows_per_pass and batch % rows_per_pass:
        raise SystemExit(f"rows_per_pass={rows_per_pass} does not divide the {batch} rows of a batch in this "
                         "process")
    fewer = range(min(most or batch, batch), 0, -1)
    sizes = [rows_per_pass] if rows_per_pass else [n for n in fewer if batch % n == 0]
    once = [(n, False) for n in sizes if checkpointing == "off" or rows_per_pass or 8 * n >= batch]
    twice = [(n, True) for n in sizes]
    options = {"off": once, "on": twice, "auto": once + twice}[checkpointing]
    # all processes have to do the same: the one with the least memory decides
    free = min(gather_object([models.free_memory(cap_gib)]))
    row = per_row(model, longest, compute)
    for rows, again in options:
        predicted = predict(model, row, rows, again)
        no_choice = rows_per_pass and checkpointing != "auto"
        if no_choice or training.fits(predicted, free):
            return rows, again, predicted
    needed = (predicted["total"] - predicted["resident"]) / 2**30
    raise SystemExit(f"one row a pass needs {needed:.1f} GiB beside what is in use, {free / 2**30:.1f} GiB "
                     "are free: a smaller MODEL=, or SET='max_prompt_tokens=.. max_completion_tokens=..' "
                     "lower")
