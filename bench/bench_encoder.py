"""How much faster is task 2's training step than sentence-transformers' own defaults?

Same model, pairs, loss and LoRA, each variant in a process of its own. Peer: the library as its documentation
uses it, with the 4-bit base's default attention and dropout, and NO_DUPLICATES batches in random order. Ours:
`train` of 03 (plain attention on a CPU, no dropout in the frozen base, batches of similar length, no casts
that autocast would undo). Batches differ, so the losses are alike and not the same. On an H200 both wait for
the launch of kernels: a step of 128 pairs takes as long with batches of any length.

    python bench/bench_encoder.py [--model M] [--rows N ...] [--steps N] [--repeat N]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

import importlib
import json
import random
import tempfile
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from transformers import PrinterCallback

from bench import measured
from common import models, training
from pipeline import knobs, results
from sources import pretrained
from task2_encoder import task

data, step = (importlib.import_module(f"task2_encoder.{name}") for name in ("01_data", "03_train"))
SPEED = "pairs_per_second"
PEER, OURS = "sentence-transformers", "ours"


def rows_of(seed: int) -> dict[str, list[dict]]:
    """{"train", "dev"}: pairs of the corpus as 01 leaves them, kept under runs/bench/."""
    def make():
        rows, _ = data.clean(data.corpus_rows())
        splits = {split: [row for row in rows if row["split"] == split] for split in ("train", "dev")}
        random.Random(seed).shuffle(splits["train"])
        return splits
    return results.cached(results.ROOT / "runs" / "bench" / "task2_encoder.json", [seed], make)


def stock(cfg, rows: list[dict], folder: str, clock) -> None:
    """A training with the library's defaults."""
    model = SentenceTransformer(pretrained.resolve(cfg.model), device=str(models.device()), model_kwargs={
        "quantization_config": models.nf4(cfg.compute, cfg.double_quant, skip=["pooler"])})
    models.keep_gradients(model)
    model.max_seq_length = cfg.max_tokens
    model.requires_grad_(False)
    targets = models.lora_targets(model.transformers_model, cfg.target_modules, ("pooler",))
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=cfg.lora_r, lora_alpha=cfg.lora_alpha,
                                 lora_dropout=cfg.lora_dropout, target_modules=targets,
                                 exclude_modules=["pooler.dense"]))
    trainer = SentenceTransformerTrainer(
        model=model,
        train_dataset=Dataset.from_list(rows).select_columns(["anchor", "positive"]),
        loss=step.contrastive_loss(model, cfg.scale),
        args=training.one_process(SentenceTransformerTrainingArguments(
            output_dir=folder, per_device_train_batch_size=cfg.batch_size, max_steps=cfg.max_steps,
            learning_rate=cfg.learning_rate, warmup_steps=cfg.warmup_steps, seed=cfg.seed,
            batch_sampler=BatchSamplers.NO_DUPLICATES, save_strategy="no", logging_steps=1,
            dataloader_num_workers=cfg.workers,
            **training.options(models.arithmetic(cfg.precision, cfg.compute)))),
        callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def measure(variant: str, model: str, rows: int, steps: int) -> dict:
    """Figures of one training."""
    profile = "gpu" if measured.has_gpu() else "cpu"
    cfg = knobs.config_of(
        step.Config, task.PROFILES[profile] | step.PROFILES[profile], model=model, batch_size=rows,
        max_steps=steps, warmup_steps=1, log_every=1, eval_every=steps)
    splits, clock = rows_of(cfg.seed), measured.Clock()
    with tempfile.TemporaryDirectory() as folder:
        if variant == OURS:
            with mock.patch.object(training, "tensorboard", lambda folder: [clock]):  # the callbacks of 03
                step.train(cfg, splits["train"], splits["dev"][:20], Path(folder, "checkpoints"), "",
                           lambda **values: None)
        else:
            stock(cfg, splits["train"], folder, clock)
    return clock.values("pairs", [rows] * steps)


def main() -> None:
    measured.need("sentence_transformers", "sentence-transformers")
    gpu = measured.has_gpu()
    args = measured.arguments(__doc__, model="embedded-minilm", rows=[128 if gpu else 32],
                              steps=300 if gpu else 12, repeat=1 if gpu else 3)
    if args.variant:
        return print(json.dumps(measure(args.variant, args.model, *args.rows, args.steps)))
    table = measured.each(__file__, {PEER: True, OURS: False}, args, SPEED)
    settings = {"model": results.public(args.model), "steps": args.steps, "repeat": args.repeat,
                "compute": models.compute_name(), "threads": torch.get_num_threads()}
    measured.write("encoder", settings, table, SPEED)


if __name__ == "__main__":
    main()
