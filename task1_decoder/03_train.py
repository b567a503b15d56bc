"""Question: what do 4-bit weights and a few million LoRA parameters learn in minutes?

Reads   runs/<run>/task1_decoder/{train,dev}.jsonl of 01
Writes  results/<run>/task1_decoder/03_train.json, runs/<run>/task1_decoder/{adapter/,log.jsonl,checkpoints/}
Needs   about 4.5 min and 3 GB on 2 cores; interrupted (Ctrl-C, kill, power), the same command resumes from the last checkpoint
"""

import json
import random
import shutil
import sys
import time
from dataclasses import dataclass

from common import models  # before anything that loads bitsandbytes: it keeps that quiet

# isort: split

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

from common import results
from task1_decoder import task, training


@dataclass(frozen=True)
class Config(task.Config):
    # -- the frozen base --
    # NormalFloat4: quantiles of a normal distribution, which trained weights follow (Dettmers et al. 2023, arXiv:2305.14314, sec. 3).
    # bf16 only if memory is plentiful and 04's attribution table shows that 4 bits cost you something.
    precision: str = "nf4"
    # Quantise the block scales too: 0.5 -> 0.127 bit a parameter (same paper), 5 MB of 112 here, 300 MB at 7B. No loss measured there.
    double_quant: bool = True

    # -- the adapter --
    # Rank, a cap on capacity: 16 x (in + out) weights a layer, 4.9M in all, 3.6 % of the model. Rank hardly mattered in the QLoRA
    # paper once all layers had one; raise it when more epochs stop lowering the training loss.
    lora_r: int = 16
    # The update is scaled by alpha / r = 2, the common default. It acts like a learning rate: tune that one, keep this.
    lora_alpha: int = 32
    # Nothing is seen twice in the CPU run, so there is nothing to overfit. 0.05 once the same rows come back for several epochs.
    lora_dropout: float = 0.0
    # Every linear layer but the head, attention and MLP: the one choice the QLoRA paper found critical (fig. 2).
    target_modules: str = "all-linear"

    # -- the optimiser --
    # Ten times the paper's 2e-4, because the model is small and the run is 90 steps, not 1,875: 96 steps took the dev loss from 4.20 to
    # 3.13 at 1e-3 and to 3.11 at 2e-3. Halve it if the loss jumps after warm-up, and for models above 1B.
    learning_rate: float = 2e-3
    # 75 x 8 = 600 rows of 16,500: what 3 minutes on 2 cores afford at 2.2 s a step. A run of 90 had dev 3.00 at step 60 and 2.98 at its
    # end: the rest is for more data, not more minutes of this kind. PROFILE=gpu takes two epochs.
    max_steps: int = 75
    # Small, because steps are few: at the same 1,152 rows, 144 steps of 8 reached dev 3.09 where 72 of 16 reached 3.11.
    batch_size: int = 8
    # Falls to zero, so the last steps average out the noise of small batches; the paper's constant rate needs thousands of steps.
    schedule: str = "cosine"
    # About 5 % of the steps: B starts at zero and Adam's second moment at nothing, so the first steps are the least trustworthy.
    warmup_steps: int = 4
    # Norms run at 0.9-2.0 here (log.jsonl), so 1.0, the library's default, trims most steps a little and caps the outliers. The paper's
    # 0.3 would leave only the direction; untuned.
    max_grad_norm: float = 1.0
    # The adapter starts as no change and sees no row twice: nothing to shrink.
    weight_decay: float = 0.0
    # The state is 2 x 4 bytes x 4.9M = 39 MB: nothing to page out, and 8 bits would save 29 MB. Fused took 16 ms of a 2.4 s step, plain
    # 30 ms (measured, 2 cores). paged_adamw_8bit is for full fine-tuning.
    optimizer: str = "adamw_torch_fused"

    # -- watching it --
    # Steps between dev losses; each costs 6 s on 2 cores. Checkpoints are written at the same steps.
    eval_every: int = 25
    # Dev losses without a new best before stopping: only a run that went wrong stops early. With longer runs, 3.
    patience: int = 2
    # Steps between log lines: one line every 15 s.
    log_every: int = 6
    # Batches sorted by length together, then shuffled: rows of one batch differ little, so 7 % of tokens are padding, not 24 %.
    bucket: int = 8


PROFILES = {
    "smoke": dict(
        max_steps=6,  # proves the path
        batch_size=4,  # same
        eval_every=3,  # two dev losses and two checkpoints
        log_every=1,  # short
        warmup_steps=1,  # of 6 steps
    ),
    "cpu": dict(),
    "gpu": dict(
        max_steps=1000,  # two epochs of 16,500 rows at 32 a step
        batch_size=32,  # keeps a big GPU busy; gradients less noisy
        learning_rate=5e-4,  # larger models want less; untuned
        warmup_steps=50,  # 5 %
        eval_every=100,  # ten readings
        log_every=20,  # fifty lines
    ),
}


def main(run):
    cfg = run.cfg
    data = run.load("01_data")
    tokenizer = models.load_tokenizer(cfg.model)
    pool, dev = (task.read_rows(run.artifact("01_data", f"{split}.jsonl")) for split in ("train", "dev"))
    prompt = task.Prompt(tokenizer, cfg, style=dev[0].get("style", "chat"))
    dev = [task.encode(prompt, row, cfg) for row in dev]
    drawn = random.Random(cfg.seed).sample(pool, min(len(pool), cfg.max_steps * cfg.batch_size))
    train = training.schedule_rows([task.encode(prompt, row, cfg) for row in drawn], cfg)

    transformers.set_seed(cfg.seed)  # before get_peft_model: the Trainer seeds too late for the initial adapter
    model = models.load_decoder(cfg.model, cfg.precision, cfg.double_quant)
    model.config.use_cache = False
    longest = task.collate(sorted(train, key=lambda e: -e["length"])[:cfg.batch_size], tokenizer.pad_token_id)
    predicted = task.training_memory(model, cfg.lora_r, *longest["input_ids"].shape, longest["logits_to_keep"])
    # the adapter stays in fp32 (PEFT's default): bf16 weights would lose small updates, and were no faster (4.5 s a step of 16, both)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=cfg.lora_r, lora_alpha=cfg.lora_alpha, bias="none",
                                             lora_dropout=cfg.lora_dropout, target_modules=cfg.target_modules))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.log(trainable=trainable, rows=len(drawn), predicted_MiB=predicted["total"] // 2**20)

    checkpoints, resume = training.open_checkpoints(run, data)
    log = run.folder / "log.jsonl"
    done = int(resume.rsplit("-", 1)[1]) if resume else -1  # lines after the checkpoint will be written again
    results.write_atomic(log, "".join(json.dumps(h) + "\n" for h in task.read_rows(log) if h["step"] <= done) if log.exists() else "")
    trainer = training.DevTrainer(
        model=model, processing_class=tokenizer, train_dataset=train, eval_dataset=dev,
        data_collator=lambda examples: task.collate(examples, tokenizer.pad_token_id),
        callbacks=[training.Log(run, log), EarlyStoppingCallback(cfg.patience)],
        args=TrainingArguments(
            output_dir=str(checkpoints), per_device_train_batch_size=cfg.batch_size, per_device_eval_batch_size=cfg.eval_batch_size,
            train_sampling_strategy="sequential", max_steps=cfg.max_steps, learning_rate=cfg.learning_rate,
            lr_scheduler_type=cfg.schedule, warmup_steps=cfg.warmup_steps, max_grad_norm=cfg.max_grad_norm,
            weight_decay=cfg.weight_decay, optim=cfg.optimizer, bf16=True, use_cpu=models.device().type == "cpu", seed=cfg.seed,
            eval_strategy="steps", eval_steps=cfg.eval_every, eval_on_start=not resume, save_steps=cfg.eval_every, save_total_limit=2,
            load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
            logging_steps=cfg.log_every, disable_tqdm=not sys.stderr.isatty(), remove_unused_columns=False,
            label_names=["labels"], report_to="none"))
    trainer.remove_callback(PrinterCallback)
    started, resident = time.time(), results.peak_memory()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.time() - started

    adapter = run.folder / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    model.save_pretrained(adapter)
    history = task.read_rows(log)
    dev_losses = [h["eval_loss"] for h in history if "eval_loss" in h]
    batches = [train[i:i + cfg.batch_size] for i in range(0, len(train), cfg.batch_size)]
    tokens = sum(e["length"] for e in train)
    facts = {
        "trainable_parameters": trainable, "trained_rows": len(train), "epochs": len(train) / len(drawn), "trained_tokens": tokens,
        "label_tokens": sum(label != -100 for e in train for label in e["labels"]),
        "padding_share": 1 - tokens / sum(len(b) * max(e["length"] for e in b) for b in batches),
        "dev_nll_before": dev_losses[0], "dev_nll_best": min(dev_losses), "steps": history[-1]["step"],
        "adapter_norm": torch.stack([p.detach().norm() for n, p in model.named_parameters() if "lora_B" in n]).norm().item(),
        "adapter_file_bytes": (adapter / "adapter_model.safetensors").stat().st_size, "peak_bytes_before_training": resident,
        "measured_peak_bytes": results.peak_memory(),
        **{f"predicted_{name}_bytes": value for name, value in predicted.items()},
        "reload_max_logit_difference": training.check_reload(cfg, model, adapter, task.collate(dev[:4], tokenizer.pad_token_id))}
    rows = [{"table": "curve", "model": "tuned", "metric": m, "step": h["step"], "value": h[m]}
            for h in history for m in ("loss", "eval_loss") if m in h]
    rows += [{"table": "training", "model": "tuned", "metric": name, "value": value} for name, value in facts.items()]
    run.save(rows, artifacts=["adapter"], tokens_per_second=None if resume else tokens / seconds)
    shutil.rmtree(checkpoints)
    run.log(dev_nll_before=dev_losses[0], dev_nll_best=min(dev_losses), steps=history[-1]["step"])


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
