"""What 03_train.py and ablations.py share: the order of rows, the dev loss, the library's Trainer around them, the reload check."""

from __future__ import annotations

import random
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from common import models, results, trainer
from task1_decoder import memory, task


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


class Clock(TrainerCallback):
    """Seconds of every step, until the accelerator is done with it."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def train(cfg, pool: list[dict], dev: list[dict], checkpoints: Path, identity: list, log):
    """Train an adapter on rows of `pool` and keep the one with the best dev loss. Returns (model with it, facts, history).

    `cfg` has the knobs of 03_train.py. The same call goes on from the last checkpoint unless `identity` or the knobs changed; the caller
    removes `checkpoints` when what it wants is saved. Under torchrun the rows of a step are dealt to the processes, in order, so the
    global batches are those of one process.
    """
    tokenizer = models.load_tokenizer(cfg.model)
    prompt = task.Prompt(tokenizer, cfg, style=dev[0].get("style", "chat"))
    dev = [task.encode(prompt, row, cfg) for row in dev]
    drawn = random.Random(cfg.seed).sample(pool, min(len(pool), cfg.max_steps * cfg.batch_size))
    rows = schedule_rows([task.encode(prompt, row, cfg) for row in drawn], cfg)

    if models.device().type == "cuda":
        torch.cuda.set_device(models.device())  # bitsandbytes computes on the current one
    transformers.set_seed(cfg.seed)  # before get_peft_model: the Trainer seeds too late for the initial adapter
    model = models.load_decoder(cfg.model, cfg.precision, cfg.compute, cfg.double_quant)
    model.config.use_cache = False
    # the adapter stays in fp32 (PEFT's default): bf16 weights would lose small updates, and were no faster (4.5 s a step of 16, both)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=cfg.lora_r, lora_alpha=cfg.lora_alpha, bias="none",
                                             lora_dropout=cfg.lora_dropout, target_modules=targets(model, cfg)))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share, compute = trainer.share(cfg.batch_size), models.arithmetic(cfg.precision, cfg.compute)
    longest = task.collate(sorted(rows, key=lambda e: -e["length"])[:share], tokenizer.pad_token_id)
    resume, readings = trainer.open_checkpoints(checkpoints, [vars(cfg), identity])
    plan = partial(memory.plan, model, longest, compute, cap_gib=cfg.memory_gib)
    per_pass, checkpointing, predicted = plan(cfg.rows_per_pass, cfg.gradient_checkpointing)
    if trainer.PROCESSES > 1:  # each has its own free memory, and all do the same: the one with the least decides
        plans = gather_object([(per_pass, checkpointing)])
        per_pass, checkpointing, predicted = plan(min(p for p, _ in plans), "on" if any(c for _, c in plans) else "off")
    log(trainable=trainable, rows=len(drawn), rows_per_pass=per_pass, passes=share // per_pass, checkpointing=checkpointing,
        predicted_GiB=predicted["total"] / 2**30)

    clock = Clock()
    args = TrainingArguments(
        output_dir=str(checkpoints), per_device_train_batch_size=per_pass, gradient_accumulation_steps=share // per_pass,
        per_device_eval_batch_size=cfg.eval_batch_size, train_sampling_strategy="sequential", max_steps=cfg.max_steps,
        learning_rate=cfg.learning_rate, lr_scheduler_type=cfg.schedule, warmup_steps=cfg.warmup_steps,
        max_grad_norm=cfg.max_grad_norm, weight_decay=cfg.weight_decay, optim=cfg.optimizer, **models.trainer_dtype(compute),
        use_cpu=models.device().type == "cpu", seed=cfg.seed, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False}, eval_strategy="steps", eval_steps=cfg.eval_every,
        eval_on_start=not resume, save_steps=cfg.eval_every, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False, ddp_find_unused_parameters=False, logging_steps=cfg.log_every,
        logging_nan_inf_filter=False, disable_tqdm=not sys.stderr.isatty(), remove_unused_columns=False, label_names=["labels"],
        report_to="none")
    args._n_gpu = min(args.n_gpu, 1)  # else one process on a host of several GPUs is spread over them by DataParallel
    loop = DevTrainer(
        model=model, processing_class=tokenizer, train_dataset=rows, eval_dataset=dev,
        data_collator=lambda examples: task.collate(examples, tokenizer.pad_token_id),
        callbacks=[trainer.Log(log, ("loss", "eval_loss", "learning_rate", "grad_norm"), readings), EarlyStoppingCallback(cfg.patience), clock],
        args=args)
    loop.remove_callback(PrinterCallback)
    started, resident = time.time(), results.peak_memory()
    loop.train(resume_from_checkpoint=resume)
    seconds = time.time() - started
    trainer.finish()

    history = results.read_rows(readings)
    losses = [h["eval_loss"] for h in history if "eval_loss" in h]
    passes = [rows[i:i + per_pass] for i in range(0, len(rows), per_pass)]
    tokens = sum(e["length"] for e in rows)
    facts = {
        "trainable_parameters": trainable, "trained_rows": len(rows), "epochs": len(rows) / len(pool), "trained_tokens": tokens,
        "label_tokens": sum(label != -100 for e in rows for label in e["labels"]),
        "padding_share": 1 - tokens / sum(len(b) * max(e["length"] for e in b) for b in passes),
        "dev_nll_before": losses[0], "dev_nll_best": min(losses), "steps": history[-1]["step"], "processes": trainer.PROCESSES,
        "rows_per_pass": per_pass, "gradient_checkpointing": checkpointing,
        "peak_bytes_before_training": resident, "measured_peak_bytes": results.peak_memory(),
        **{f"predicted_{name}_bytes": value for name, value in predicted.items()},
        "training_seconds": seconds, "tokens_per_second": None if resume else tokens / seconds,
        "median_step_seconds": statistics.median(clock.seconds) if clock.seconds else None}  # none if all steps were made before
    return model.eval(), facts, history


def targets(model, cfg):
    """`target_modules` as PEFT takes it: "all-linear", a regular expression, or names separated by commas. SystemExit with the names
    of the model's linear layers for one that it has not, and for a model without any."""
    found = sorted({name.rsplit(".", 1)[-1] for name in models.linear_layers(model)})
    if not found:
        raise SystemExit(f"MODEL={cfg.model}: {type(model).__name__} has no linear layers that LoRA could adapt")
    if cfg.target_modules == "all-linear":
        return cfg.target_modules
    if not re.fullmatch(r"[\w.,]+", cfg.target_modules):  # a regular expression
        if not any(re.fullmatch(cfg.target_modules, name) for name in models.linear_layers(model)):
            raise SystemExit(f"target_modules={cfg.target_modules!r} matches no linear layer of {cfg.model}; it has {', '.join(found)}")
        return cfg.target_modules
    wanted = cfg.target_modules.split(",")
    if missing := [name for name in wanted if name not in found]:
        raise SystemExit(f"target_modules: no linear layer named {', '.join(missing)} in {cfg.model}; it has {', '.join(found)}")
    return wanted


def check_reload(cfg, model, adapter: Path, rows: list[dict]) -> float:
    """Largest logit difference, on some rows, between the model in memory and base + adapter from disk; must be 0, SystemExit if not. A
    saved thing nobody reloaded is not saved."""
    tokenizer = models.load_tokenizer(cfg.model)
    prompt = task.Prompt(tokenizer, cfg, style=rows[0].get("style", "chat"))
    batch = task.collate([task.encode(prompt, row, cfg) for row in rows], tokenizer.pad_token_id)
    inputs = {k: v.to(model.device) for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
    compute = models.arithmetic(cfg.precision, cfg.compute)
    fresh = PeftModel.from_pretrained(models.load_decoder(cfg.model, cfg.precision, cfg.compute, cfg.double_quant), adapter).eval()
    with torch.inference_mode(), models.autocast(compute):
        reloaded, kept = fresh(**inputs).logits, model.eval()(**inputs).logits
        with fresh.disable_adapter():
            base = fresh(**inputs).logits
    difference = (reloaded - kept).abs().max().item()
    if difference != 0 or torch.equal(reloaded, base):
        raise SystemExit(f"{results.shown(adapter)} reloads wrongly: logits differ by {difference}, "
                         f"{'and equal the base' if torch.equal(reloaded, base) else 'though they are not the base'}")
    return difference
