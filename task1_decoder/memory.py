"""How many rows of a batch fit into the memory at once, and whether activations have to be computed twice."""

from __future__ import annotations

import torch

from common import memory, models

# Bytes of the backward pass for each logit, beside those that the forward pass saves: gradients and copies in fp32 and 16 bits. With it
# the peaks of 1.93B parameters in NF4 on an H100 were predicted as 5.4, 9.1, 16.6 and 61.5 GiB for 8, 16, 32 and 128 rows a pass, and
# measured as 5.6, 9.5, 17.3 and 63.9.
LOGIT_GRADIENT = 12


def per_row(model, longest: dict, compute: str) -> dict[str, int]:
    """Bytes of one row of the batch `longest`: {"activations", "logits", "inputs" (what checkpointing keeps of the layers)}, "constant",
    which does not grow with the rows, and "layers", their number."""
    rows, columns = longest["input_ids"].shape
    vocabulary, text = model.get_output_embeddings().weight.shape[0], model.config.get_text_config()
    batches = [{k: v[:n].to(model.device) if torch.is_tensor(v) else v for k, v in longest.items()} for n in (1, 2) if n <= rows]
    one, *more = [memory.saved_bytes(model, lambda batch=batch: model(**batch).loss, compute, vocabulary) for batch in batches]
    two = more[0] if more else {kind: 2 * size for kind, size in one.items()}
    row = {kind: two[kind] - one[kind] for kind in one}
    width = models.DTYPES[compute].itemsize * text.hidden_size * columns
    return {"activations": row["activations"], "logits": row["logits"] + LOGIT_GRADIENT * longest["logits_to_keep"] * vocabulary,
            "inputs": width * text.num_hidden_layers, "layers": text.num_hidden_layers,
            "constant": max(0, one["activations"] - row["activations"])}


def predict(model, row: dict, rows: int, checkpointing: bool) -> dict[str, int]:
    """Predicted bytes of a step of `rows` rows, as from `memory.predict`. With `checkpointing` the activations are those of one layer and
    the inputs of all."""
    activations = row["activations"] / row["layers"] + row["inputs"] if checkpointing else row["activations"]
    return memory.predict(model, activations=int(rows * activations) + row["constant"], logits=rows * row["logits"])


def plan(model, longest: dict, compute: str, rows_per_pass: int, checkpointing: str, cap_gib: float):
    """(rows of one pass, whether to checkpoint, prediction) for a batch `longest`, whose other rows follow by gradient accumulation.

    `rows_per_pass` 0 and `checkpointing` "auto" leave the choice to the free memory (`cap_gib`: see models.free_memory). Fewer rows come
    before checkpointing down to an eighth of the batch: more passes cost less than computing everything twice. SystemExit with the
    predicted size if nothing fits.
    """
    batch, free = len(longest["input_ids"]), models.free_memory(cap_gib)
    if rows_per_pass and batch % rows_per_pass:
        raise SystemExit(f"rows_per_pass={rows_per_pass} does not divide the {batch} rows of a batch in this process")
    if checkpointing not in ("auto", "on", "off"):
        raise SystemExit(f"gradient_checkpointing={checkpointing!r}: one of auto, on, off")
    row = per_row(model, longest, compute)
    sizes = [rows_per_pass] if rows_per_pass else [n for n in range(batch, 0, -1) if batch % n == 0]
    options = [(n, False) for n in sizes if checkpointing == "off" or 8 * n >= batch or rows_per_pass]
    options = [] if checkpointing == "on" else options
    options += [] if checkpointing == "off" else [(n, True) for n in sizes]
    for rows, again in options:
        predicted = predict(model, row, rows, again)
        asked = rows_per_pass and checkpointing != "auto"  # both were said: no choice is left
        if asked or memory.fits(predicted, free):
            return rows, again, predicted
    raise SystemExit(f"one row a pass needs {(predicted['total'] - predicted['resident']) / 2**30:.1f} GiB beside what is in use, "
                     f"{free / 2**30:.1f} GiB are free: a smaller MODEL=, or SET='max_prompt_tokens=.. max_completion_tokens=..' lower")
