"""Batches for CUDA graphs, and the graphs themselves where there is a GPU."""

import pytest
import torch

from common import models
from task1_decoder import graphs, task


def example(prompt: int, answer: int) -> dict:
    return {"prompt": [5] * prompt, "answer": [7] * answer}


def test_batches_have_few_shapes_and_the_same_labels():
    rows = [example(20, 3), example(9, 6)]
    plain, rounded = task.collate(rows, 0), task.collate(rows, 0, columns=16, kept=13)
    assert plain["input_ids"].shape == (2, 23) and rounded["input_ids"].shape == (2, 32)
    assert plain["logits_to_keep"] == 7 and rounded["logits_to_keep"] == 13
    for batch in (plain, rounded):
        assert (batch["labels"] != -100).sum(1).tolist() == [3, 6]
        assert batch["attention_mask"].sum(1).tolist() == [23, 15]
        assert batch["input_ids"][:, -1].tolist() == [7, 7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
def test_repeated_passes_add_the_gradients_of_launched_ones(tiny_model_folder):
    """Two shapes, each twice, with the gradients of an earlier pass kept."""
    batches = [task.collate([example(p, 4), example(p + 3, 2)], 0, 16, 8) for p in (8, 20, 9, 21)]
    found = []
    for recorded in (False, True):
        model = models.load_decoder(str(tiny_model_folder), "fp32").train()
        repeat = graphs.Graphs(model.parameters())

        def run(batch, model=model):
            loss = model(**batch).loss
            loss.backward()
            return loss.detach()
        losses = []
        for batch in batches:
            batch = {k: v.to("cuda") if torch.is_tensor(v) else v for k, v in batch.items()}
            losses.append((repeat(run, batch) if recorded else run(batch)).item())
        found.append((losses, [p.grad.clone() for p in model.parameters()]))
    (launched, expected), (repeated, got) = found
    torch.testing.assert_close(torch.tensor(repeated), torch.tensor(launched))
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
