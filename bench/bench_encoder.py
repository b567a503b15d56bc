"""How much faster is task 2's training step than sentence-transformers' own defaults? Same model, pairs, loss and LoRA, same process.

Peer: the library as its documentation uses it: 4-bit base with its default attention and its dropout, NO_DUPLICATES batches in random
order. Ours: training.train as 03 calls it (plain attention on a CPU, no dropout in the frozen base, batches of similar length, no casts
that autocast would undo). Alternating; prints pairs per second of each and the ratio.

    python bench/bench_encoder.py [steps each time, default 12]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

import json
import shutil
import time
from types import SimpleNamespace

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import PrinterCallback, ProgressCallback

from common import models, results
from task2_encoder import training


def stock(cfg, rows: list[dict], steps: int, folder) -> float:
    """Seconds for `steps` steps with the library's defaults."""
    model = SentenceTransformer(models.resolve(cfg.model), device=str(models.device()),
                                model_kwargs={"quantization_config": models.nf4(cfg.compute, cfg.double_quant, skip=["pooler"])})
    models.keep_gradients(model)
    model.max_seq_length = cfg.max_tokens
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=cfg.lora_r, lora_alpha=cfg.lora_alpha,
                                 target_modules=training.targets(model, cfg), exclude_modules=["pooler.dense"]))
    trainer = SentenceTransformerTrainer(
        model=model, loss=MultipleNegativesRankingLoss(model, scale=cfg.scale, **training.SYMMETRIC),
        train_dataset=Dataset.from_dict({side: [r[side] for r in rows] for side in ("anchor", "positive")}),
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=cfg.batch_size, max_steps=steps, learning_rate=cfg.learning_rate,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            **models.trainer_dtype(models.arithmetic(cfg.precision, cfg.compute)), use_cpu=models.device().type == "cpu", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, report_to="none"))
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main(steps: int) -> None:
    folder = results.ROOT / "runs" / "cpu" / "task2_encoder"
    if not (folder / "train.jsonl").exists():
        raise SystemExit(f"{results.shown(folder / 'train.jsonl')} is missing: make task2")
    rows, dev = results.read_rows(folder / "train.jsonl"), results.read_rows(folder / "dev.jsonl")[:20]
    config = json.loads((results.ROOT / "results" / "cpu" / "task2_encoder" / "03_train.json").read_text())["config"]
    cfg = SimpleNamespace(**config | {"max_steps": steps, "eval_every": steps, "log_every": steps, "warmup_steps": 1})
    seconds = {"sentence-transformers": [], "task 2": []}
    for again in range(3):
        torch.manual_seed(again)
        seconds["sentence-transformers"].append(stock(cfg, rows, steps, folder / "bench"))
        _, facts, _ = training.train(cfg, [dict(r) for r in rows], dev, folder / "bench", "bench", lambda **values: None)
        shutil.rmtree(folder / "bench")
        seconds["task 2"].append(facts["training_seconds"])
    speed = {name: steps * cfg.batch_size / sorted(values)[1] for name, values in seconds.items()}
    print(" ".join(f"{name.replace(' ', '_')}={value:.1f}_pairs/s" for name, value in speed.items()),
          f"ratio={speed['task 2'] / speed['sentence-transformers']:.2f} median_of=3 steps={steps} device={results.environment()['device']}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
