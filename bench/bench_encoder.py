"""How much faster is task 2's training step than sentence-transformers' own defaults?

Same model, pairs, loss and LoRA in the same process. Peer: the library as its documentation uses it, with the
4-bit base's default attention and dropout, and NO_DUPLICATES batches in random order. Ours: `train` of 03
(plain attention on a CPU, no dropout in the frozen base, batches of similar length, no casts that autocast
would undo). Alternating; prints pairs per second of each and the ratio.

    python bench/bench_encoder.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

import importlib
import shutil
import time

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from transformers import PrinterCallback

from common import models, results, training

step = importlib.import_module("task2_encoder.03_train")
STEPS = 12  # of each training


def stock(cfg, rows, folder):
    """Seconds for the steps with the library's defaults."""
    model = SentenceTransformer(models.resolve(cfg.model), device=str(models.device()), model_kwargs={
        "quantization_config": models.nf4(cfg.compute, cfg.double_quant, skip=["pooler"])})
    models.keep_gradients(model)
    model.max_seq_length = cfg.max_tokens
    model.requires_grad_(False)
    targets = models.lora_targets(model.transformers_model, cfg.target_modules, ("pooler",))
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=cfg.lora_r, lora_alpha=cfg.lora_alpha,
                                 target_modules=targets, exclude_modules=["pooler.dense"]))
    trainer = SentenceTransformerTrainer(
        model=model,
        train_dataset=Dataset.from_list(rows).select_columns(["anchor", "positive"]),
        loss=step.contrastive_loss(model, cfg.scale),
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=cfg.batch_size, max_steps=cfg.max_steps,
            learning_rate=cfg.learning_rate, batch_sampler=BatchSamplers.NO_DUPLICATES, save_strategy="no",
            logging_strategy="no", **training.options(models.arithmetic(cfg.precision, cfg.compute))))
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main():
    stored = results.read(results.ROOT / "results" / "cpu" / "task2_encoder" / "03_train.json")
    cfg = results.config_of(step.Config, stored["config"], max_steps=STEPS, eval_every=STEPS, warmup_steps=1)
    folder = results.ROOT / "runs" / "cpu" / "task2_encoder"
    rows, dev = (results.read_rows(folder / f"{split}.jsonl") for split in ("train", "dev"))
    theirs, ours = [], []
    for _ in range(3):
        theirs.append(stock(cfg, rows, folder / "bench"))
        _, stats, _ = step.train(cfg, rows, dev[:20], folder / "bench", "bench", lambda **values: None)
        ours.append(stats["training_seconds"])
        shutil.rmtree(folder / "bench")
    peer, own = (STEPS * cfg.batch_size / sorted(seconds)[1] for seconds in (theirs, ours))
    print(f"sentence-transformers={peer:.1f}_pairs/s task_2={own:.1f}_pairs/s ratio={own / peer:.2f} "
          f"median_of=3 steps={STEPS} device={results.environment()['device']}")


if __name__ == "__main__":
    main()
