"""What 03_train.py needs around the library's Trainer: the order of rows, the dev loss, the log, resuming, the reload check."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import asdict

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from common import models, results
from task1_decoder import task


def schedule_rows(rows, cfg):
    """The rows of every step in training order: epochs of shuffled batches whose rows have similar length.

    The list is the schedule, read in sequence, so a resumed run sees exactly what the uninterrupted one would have seen.
    """
    rng, ordered, needed = random.Random(cfg.seed), [], cfg.max_steps * cfg.batch_size
    while len(ordered) < needed:
        epoch = rng.sample(rows, len(rows))[:needed - len(ordered)]
        for start in range(0, len(epoch), cfg.bucket * cfg.batch_size):
            span = sorted(epoch[start:start + cfg.bucket * cfg.batch_size], key=lambda r: r["length"])
            batches = [span[i:i + cfg.batch_size] for i in range(0, len(span), cfg.batch_size)]
            rng.shuffle(batches)
            ordered += [row for batch in batches for row in batch]
    return ordered


class DevTrainer(Trainer):
    """Trainer whose evaluation is task.nll: weighted by token, and the very function that 02 and 04 report."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        with self.autocast_smart_context_manager():
            items = task.nll(self.model, self.processing_class, self.eval_dataset, self.args.per_device_eval_batch_size)
        self.model.train()
        metrics = {"eval_loss": sum(i["nats"] for i in items) / sum(i["tokens"] for i in items)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Log(TrainerCallback):
    """One key=value line on the screen and one JSON line in log.jsonl per logging step."""

    def __init__(self, run, path):
        self.run, self.path = run, path

    def on_log(self, args, state, control, logs=None, **kwargs):
        kept = {k: logs[k] for k in ("loss", "eval_loss", "learning_rate", "grad_norm") if k in logs}
        if kept:
            self.run.log(step=f"{state.global_step}/{state.max_steps}", **kept)
            with self.path.open("a") as stream:
                stream.write(json.dumps({"step": state.global_step, **kept}) + "\n")


def open_checkpoints(run, data):
    """(folder, last checkpoint or None). Checkpoints of other knobs or other data are removed: resuming would mix two runs."""
    folder = run.folder / "checkpoints"
    identity = hashlib.sha256(json.dumps([asdict(run.cfg), results.result_hash(data)]).encode()).hexdigest()
    stored = folder / "identity"
    if folder.exists() and not (stored.exists() and stored.read_text() == identity):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    stored.write_text(identity)
    for checkpoint in folder.glob("checkpoint-*"):  # the library writes in place, its state last: cut short, the process died meanwhile
        state = checkpoint / "trainer_state.json"
        if not (state.exists() and state.read_text().rstrip().endswith("}")):
            shutil.rmtree(checkpoint)
    return folder, get_last_checkpoint(str(folder))


def check_reload(cfg, model, adapter, batch):
    """Largest logit difference between the model in memory and base + adapter from disk; must be 0. A saved thing nobody
    reloaded is not saved."""
    inputs = {k: v.to(model.device) for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
    fresh = PeftModel.from_pretrained(models.load_decoder(cfg.model, cfg.precision, cfg.double_quant), adapter).eval()
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16):
        reloaded, kept = fresh(**inputs).logits, model.eval()(**inputs).logits
        with fresh.disable_adapter():
            base = fresh(**inputs).logits
    difference = (reloaded - kept).abs().max().item()
    if difference != 0 or torch.equal(reloaded, base):
        raise SystemExit(f"{results.shown(adapter)} reloads wrongly: logits differ by {difference}, "
                         f"{'and equal the base' if torch.equal(reloaded, base) else 'though they are not the base'}")
    return difference
