"""Question: what do 4-bit weights and a few million LoRA parameters learn in minutes?

Reads   runs/<run>/task1_decoder/{train,dev}.jsonl of 01
Writes  results/<run>/task1_decoder/03_train.json, runs/<run>/task1_decoder/{adapter/,checkpoints/}
Needs   about 4 min and 4.5 GB on 2 cores; interrupted (Ctrl-C, kill, power), the same command resumes from
        the last checkpoint
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import random
import shutil
import time
from dataclasses import dataclass, replace

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from common import models, training
from common.stats import facts
from sources import pretrained
from task1_decoder import memory, rehearsal, scoring, task
from task1_decoder.graphs import Graphs


@dataclass(frozen=True)
class Config(task.Config):
    # -- the adapter --
    # Rank, a cap on capacity: 16 x (in + out) weights a layer, 4.9M in all, 3.6 % of the model (19.5M and
    # 1.0 % in run gpu). It hardly mattered in the QLoRA paper; 4 cost 0.01 to 0.02 nats here (make
    # ablations). Raise it when more epochs stop lowering the training loss.
    lora_r: int = 16
    # The update is scaled by alpha / r = 2, the common default. It acts like a learning rate: tune that
    # one, keep this.
    lora_alpha: int = 32
    # Nothing is seen twice in runs cpu and gpu, so there is nothing to overfit. 0.05 once the same rows
    # come back for several epochs.
    lora_dropout: float = 0.0
    # Every linear layer but the head, attention and MLP: the one choice the QLoRA paper found critical
    # (fig. 2); attention alone costs 0.02 to 0.04 nats here (make ablations). PEFT finds them in any
    # architecture; or names separated by commas, or a regular expression.
    target_modules: str = "all-linear"

    # -- the optimiser --
    # Ten times the paper's 2e-4: the model is small, and the run is 75 steps, not 1,875. 96 steps of an
    # earlier run took the dev loss from 4.20 to 3.13 at 1e-3 and to 3.11 at 2e-3. Halve it if the loss jumps
    # after warm-up. 5e-4 on a GPU, untuned: larger models and longer runs want less.
    learning_rate: float = 2e-3
    # 75 x 8 = 600 rows, 540 of the 15,914 functions and 60 of rehearsal: what 3 minutes on 2 cores afford at
    # 2.5 s a step. An earlier run of 90 had dev 3.00 at step 60 and 2.98 at its end. On a GPU 400 x 32 =
    # 12,800 rows are 0.8 epochs in 1.2 minutes of steps; dev falls from 3.06 at step 100 to 2.99. Own data:
    # epochs x rows / batch_size, with two or three epochs.
    max_steps: int = 75
    # Small, because steps are few: at the same 1,152 rows, 144 steps of 8 reached dev 3.09 where 72 of 16
    # reached 3.11 (earlier runs). 32 on a GPU, where steps are many and 8 rows leave most of it idle.
    batch_size: int = 8
    # Falls to zero, so the last steps average out the noise of small batches; the paper's constant rate
    # needs thousands of steps.
    schedule: str = "cosine"
    # 5 % of the steps, 4 of 75 or 20 of 400: Adam's statistics are unreliable in the first steps.
    warmup_steps: int = 4
    # Norms run at 0.9-2.0 here, so 1.0, the library's default, trims most steps a little and caps the
    # outliers. The paper's 0.3 would leave only the direction. Untuned.
    max_grad_norm: float = 1.0
    # The adapter starts as no change and sees no row twice: nothing to shrink.
    weight_decay: float = 0.0
    # The state is 2 x 4 bytes x 4.9M = 39 MB (156 MB in run gpu): nothing to page out, and 8 bits would save
    # 29 MB. Fused took 16 ms of a 2.4 s step, plain 30 ms (measured, 2 cores). paged_adamw_8bit is for full
    # fine-tuning.
    optimizer: str = "adamw_torch_fused"

    # -- memory --
    # Rows of a batch computed at once, 0 = as many as fit; the others follow by gradient accumulation,
    # which trains the same.
    rows_per_pass: int = 0
    # GiB of memory to plan for, 0 = what is free: fewer rows a pass, then checkpointing, stay below.
    memory_gib: float = 0.0
    # Compute activations again in the backward pass instead of keeping them: a third more arithmetic for a
    # fraction of their memory. "auto" turns it on when an eighth of the batch does not fit without; make
    # ablations PROFILE=gpu measures "on" and "off".
    gradient_checkpointing: str = "auto"
    # Repeat recorded kernels instead of launching each, on one CUDA GPU in bf16 or fp32: three times the
    # speed for batches of 32 short rows (graphs.py). Not with checkpointing.
    cuda_graphs: bool = True
    # Liger's fused kernels for norms, rotary positions and the MLP's gate, on a GPU with the package
    # liger-kernel and for the architectures it knows: a fifth less memory and time. The loss moves in the
    # fourth digit.
    liger: bool = True

    # -- what it should not forget --
    # Share of the rows that are the base's own answers to general questions (rehearsal.jsonl): without them
    # it answers everything as briefly as it describes functions. In run gpu the base answers 55 of 106 such
    # questions in 16 bits, the tuned model 30 with 0 and 52 with 0.1, at a held-out NLL of 2.680 and 2.689.
    rehearsal: float = 0.1

    # -- watching it --
    # Steps between dev losses; each costs 6 s on 2 cores. Checkpoints are written at the same steps.
    eval_every: int = 25
    # Dev losses without a new best before stopping: only a run that went wrong stops early. With longer
    # runs, take 3.
    patience: int = 2
    # Steps between log lines: one line every 15 s.
    log_every: int = 6
    # Batches sorted by length together, then shuffled: rows of one batch differ little, so 7 % of tokens
    # are padding, not 24 %.
    bucket: int = 8


PROFILES = {
    "smoke": dict(max_steps=6, batch_size=4, eval_every=3, log_every=1, warmup_steps=1),
    "cpu": dict(),
    "gpu": dict(
        max_steps=400,  # 11,520 of the 15,914 functions, each once
        batch_size=32,  # keeps a big GPU busy, and gradients are less noisy
        learning_rate=5e-4,  # larger models want less; untuned
        warmup_steps=20,  # 5 %
        eval_every=100,
        log_every=10,
    ),
}


# ---------------------------------------------------------------------------------------- base and adapter

def load_base(cfg):
    """The frozen base in `cfg.precision` (4 bits), with the kernels that training uses."""
    base = models.load_decoder(cfg.model, cfg.precision, cfg.compute, cfg.double_quant)
    if cfg.liger and models.device().type == "cuda" and is_liger_kernel_available():
        apply_liger_kernel(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    return base


def load_model(cfg):
    """`load_base` with a LoRA adapter that is no change yet."""
    if models.device().type == "cuda":
        torch.cuda.set_device(models.device())  # bitsandbytes computes on the current one
    transformers.set_seed(cfg.seed)  # LoRA's A is drawn below; the Trainer would seed too late for it
    base = load_base(cfg)
    base.config.use_cache = False
    # The adapter stays in fp32, PEFT's default: bf16 would round small updates away, and was no faster (4.5 s
    # a step of 16 rows, both).
    # bias: none is trained, LoRA's usual way; SmolLM2 has none.
    return get_peft_model(base, LoraConfig(
        task_type="CAUSAL_LM", r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout,
        bias="none", target_modules=models.lora_targets(base, cfg.target_modules)))


# ---------------------------------------------------------------------------------------- batches and loss

def schedule(examples: list[dict], cfg, rehearsed: list[dict] = ()) -> list[dict]:
    """The examples of every step in training order: shuffled batches of rows of similar length, by epoch,
    with `rehearsed` spread among them.

    The Trainer reads the list in sequence, so a resumed run sees what an uninterrupted one would have seen.
    """
    def length(example):
        return len(example["prompt"]) + len(example["answer"])
    rng, ordered, needed = random.Random(cfg.seed), [], cfg.max_steps * cfg.batch_size
    mixed = []
    while len(mixed) < needed - len(rehearsed):
        mixed += rng.sample(examples, len(examples))
    del mixed[needed - len(rehearsed):]
    for place, example in zip(sorted(rng.sample(range(needed), len(rehearsed))), rehearsed):
        mixed.insert(place, example)
    for start in range(0, needed, cfg.bucket * cfg.batch_size):
        span = sorted(mixed[start:start + cfg.bucket * cfg.batch_size], key=length)
        batches = [span[i:i + cfg.batch_size] for i in range(0, len(span), cfg.batch_size)]
        rng.shuffle(batches)
        ordered += [example for batch in batches for example in batch]
    return ordered


class DevTrainer(Trainer):
    """The library's Trainer. The loss is the model's own: cross-entropy of the answer's tokens and its end.

    The dev loss is the function that 02 and 04 report, weighted by token. With `graphs` a pass is repeated
    from its recording.
    """

    graphs = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = super().training_step
        if not self.graphs:
            return step(model, inputs, num_items_in_batch)

        def run(batch):
            inputs = {name: value for name, value in batch.items() if name != "items"}
            return step(model, inputs, batch["items"])
        items = torch.as_tensor(num_items_in_batch, device=model.device)
        return self.graphs(run, self._prepare_inputs(inputs) | {"items": items})

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        with self.autocast_smart_context_manager():
            batch_size = self.args.per_device_eval_batch_size
            items = scoring.score_answers(self.model, self.processing_class, self.eval_dataset, batch_size)
        self.model.train()
        metrics = {"eval_loss": task.nll(items)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


# ------------------------------------------------------------------------------------------------ training

def train(cfg, rows: list[dict], dev: list[dict], checkpoints: Path, data_hash: str, log,
          rehearsed: list[dict] = (), start=None, callbacks=()):
    """Train an adapter on `rows`, some of `rehearsed` among them, and keep the one with the best dev loss.

    Returns (model in eval mode, training stats, the library's log history). `start(model)` may change the
    adapter's first values. The same call resumes from the last checkpoint unless knobs or data (`data_hash`)
    changed; the caller removes `checkpoints` once it has saved what it wants.
    """
    tokenizer = models.load_tokenizer(cfg.model)
    dev = task.encode(tokenizer, dev, cfg)
    drawn = random.Random(cfg.seed).sample(rows, min(len(rows), cfg.max_steps * cfg.batch_size))
    general = task.encode(tokenizer, rehearsed, replace(cfg, instruction="")) if rehearsed else []
    examples = schedule(task.encode(tokenizer, drawn, cfg), cfg, general)
    model = load_model(cfg)
    if start:
        start(model)

    compute, per_process = models.arithmetic(cfg.precision, cfg.compute), training.per_process(cfg.batch_size)
    last = training.open_checkpoints(checkpoints, [vars(cfg), data_hash])
    passes = memory.choose(model, examples, cfg, compute, tokenizer.pad_token_id)
    stats = {"trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
             "trained_rows": len(examples), "epochs": len(examples) / len(rows),
             "rehearsed_rows": len(rehearsed),
             "rows_per_pass": passes.rows,
             "gradient_checkpointing": passes.checkpointing, "cuda_graphs": passes.graphs,
             "processes": training.PROCESSES}
    runner.FACTS["predicted_GiB"] = passes.predicted["total"] / 2**30  # said if memory runs out
    log(**stats, predicted_GiB=runner.FACTS["predicted_GiB"])

    args = training.one_process(TrainingArguments(
        output_dir=str(checkpoints), max_steps=cfg.max_steps, seed=cfg.seed,
        learning_rate=cfg.learning_rate, lr_scheduler_type=cfg.schedule, warmup_steps=cfg.warmup_steps,
        max_grad_norm=cfg.max_grad_norm, weight_decay=cfg.weight_decay, optim=cfg.optimizer,
        # the rows of a global batch, in the order of `schedule`, are divided among passes and processes
        per_device_train_batch_size=passes.rows, gradient_accumulation_steps=per_process // passes.rows,
        train_sampling_strategy="sequential", remove_unused_columns=False, label_names=["labels"],
        gradient_checkpointing=passes.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        # the best and the last checkpoint are kept, and the best is loaded in the end
        eval_strategy="steps", eval_steps=cfg.eval_every, eval_on_start=not last,
        per_device_eval_batch_size=cfg.eval_batch_size, save_steps=cfg.eval_every, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        logging_steps=cfg.log_every, ddp_find_unused_parameters=False, **training.options(compute)))
    trainer = DevTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=examples, eval_dataset=dev,
        data_collator=lambda batch: task.collate(batch, tokenizer.pad_token_id, *passes.shapes),
        callbacks=[training.Log(log, ("loss", "eval_loss", "learning_rate", "grad_norm")),
                   EarlyStoppingCallback(cfg.patience), *callbacks,
                   *training.tensorboard(checkpoints.with_name("tensorboard"))])
    trainer.remove_callback(PrinterCallback)
    trainer.graphs = Graphs(model.parameters()) if passes.graphs else None
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - started
    training.finish()

    history = trainer.state.log_history
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    lengths = [len(example["prompt"]) + len(example["answer"]) for example in examples]
    padded = sum(passes.rows * max(lengths[i:i + passes.rows]) for i in range(0, len(lengths), passes.rows))
    stats |= {
        "steps": trainer.state.global_step,
        "trained_tokens": sum(lengths),
        "padding_share": 1 - sum(lengths) / padded,
        "dev_nll_before": losses[0],
        "dev_nll_best": min(losses),
        **{f"predicted_{name}_bytes": size for name, size in passes.predicted.items()},
        "measured_peak_bytes": runner.peak_memory(),
        "training_seconds": None if last else seconds,  # nobody knows those before a resumption
        "tokens_per_second": None if last else sum(lengths) / seconds,
    }
    return model.eval(), stats, history


# -------------------------------------------------------------------------------------------- what is kept

def save(model, cfg, adapter: Path, dev: list[dict]) -> dict[str, float]:
    """Write the adapter and its tokenizer, reload it onto a fresh base, and compare logits on some dev rows.

    The adapter names the base as it is known elsewhere, not by its folder on this machine.
    SystemExit if it does not reload exactly, or reloads as the base: what nobody has reloaded is not saved.
    """
    shutil.rmtree(adapter, ignore_errors=True)
    tokenizer, config = models.load_tokenizer(cfg.model), model.peft_config["default"]
    config.base_model_name_or_path, config.revision = pretrained.public_name(cfg.model)
    if isinstance(config.target_modules, set):  # whose order differs between processes
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(adapter, save_embedding_layers=False)
    (adapter / "README.md").unlink()  # PEFT's, not filled in: 04 writes one with its figures
    examples = task.encode(tokenizer, dev, cfg)
    models.save_companions(model, tokenizer, adapter, examples)

    batch = task.collate(examples, tokenizer.pad_token_id)
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "position_ids")}
    fresh = PeftModel.from_pretrained(load_base(cfg), adapter).eval()
    with torch.inference_mode(), models.autocast(models.arithmetic(cfg.precision, cfg.compute)):
        reloaded, trained = fresh(**inputs).logits, model(**inputs).logits
        with fresh.disable_adapter():
            untrained = fresh(**inputs).logits
    difference, moved = ((reloaded - other).abs().max().item() for other in (trained, untrained))
    if difference != 0 or moved == 0:
        raise SystemExit(f"{results.shown(adapter)} reloads wrongly: its logits differ by {difference} from "
                         f"the trained model's, by {moved} from the base's")
    return {"adapter_file_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
            "reload_max_logit_difference": difference}


def main(run):
    cfg, data = run.cfg, run.load("01_data")
    rows, dev = map(run.rows, ("train", "dev"))
    checkpoints = run.folder / "checkpoints"
    model, stats, history = train(cfg, rows, dev, checkpoints, results.result_hash(data), run.log,
                                  rehearsal.rows(run, cfg))
    if not runner.MAIN_PROCESS:
        return  # all have the same weights, and the first process saves them
    stats |= save(model, cfg, run.folder / "adapter", dev[:4])
    table = []
    for entry in history:
        read = {metric: entry[metric] for metric in ("loss", "eval_loss") if metric in entry}
        table += facts("curve", "tuned", read, step=entry["step"])
    table += facts("training", "tuned", stats)
    run.save(table, artifacts=["adapter"], tokens_per_second=stats["tokens_per_second"])
    training.remove(checkpoints)
    run.log(dev_nll_before=stats["dev_nll_before"], dev_nll_best=stats["dev_nll_best"], steps=stats["steps"])


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
