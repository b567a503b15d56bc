"""How much faster is task 1's training step than TRL's SFTTrainer, the usual way to do QLoRA?

Same base in 4 bits, LoRA layers, rows, batches and order, so the losses are alike. Each variant runs in a
process of its own. Ours is `train` of 03: as it is, and on a GPU also with kernels launched one by one, with
and without Liger's. TRL keeps what it does by itself: logits of trained tokens only, and on a GPU an adapter
in bf16. It does without checkpointing, as ours does. Liger's kernels are put into its base before the trainer
sees it, and counted, because `use_liger_kernel` is silent where it applies none.

    python bench/bench_decoder.py [--model M] [--rows 8 32 64 128] [--steps N] [--repeat N]
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
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from bench import measured
from common import models, training
from pipeline import knobs, results
from task1_decoder import task
from task1_decoder.graphs import Graphs

data, step = (importlib.import_module(f"task1_decoder.{name}") for name in ("01_data", "03_train"))
SPEED = "tokens_per_second"
TRL, TRL_LIGER, OURS = "TRL", "TRL + Liger", "ours"
# knobs of 03 in each variant of ours; "ours" is what 03 does by itself
KNOBS = {"ours, launched": {"cuda_graphs": False, "liger": False}, "ours, Liger": {"cuda_graphs": False},
         OURS: {}}


def rows_of(cfg) -> list[dict]:
    """Training rows of the corpus as 01 draws them, kept under runs/bench/."""
    def make():
        return {"rows": data.shuffled(data.corpus_rows()[0], "train", cfg.seed)}
    return results.cached(results.ROOT / "runs" / "bench" / "task1_decoder.json", [cfg.seed], make)["rows"]


def trl(cfg, examples: list[dict], folder: str, clock, liger: bool):
    """SFTTrainer on encoded examples, in their order; returns the model."""
    from trl import SFTConfig, SFTTrainer
    tokenizer, compute = models.load_tokenizer(cfg.model), models.arithmetic(cfg.precision, cfg.compute)
    transformers.set_seed(cfg.seed)
    base = models.load_decoder(cfg.model, cfg.precision, cfg.compute, cfg.double_quant)
    if liger:
        apply_liger_kernel(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    args = SFTConfig(
        output_dir=folder, max_steps=cfg.max_steps, seed=cfg.seed, per_device_train_batch_size=cfg.batch_size,
        learning_rate=cfg.learning_rate, lr_scheduler_type=cfg.schedule, warmup_steps=cfg.warmup_steps,
        max_grad_norm=cfg.max_grad_norm, weight_decay=cfg.weight_decay, optim=cfg.optimizer,
        train_sampling_strategy="sequential", gradient_checkpointing=False, completion_only_loss=True,
        max_length=None, packing=False, save_strategy="no", logging_steps=1, **training.options(compute))
    columns = [{"input_ids": example["prompt"] + example["answer"],
                "completion_mask": [0] * len(example["prompt"]) + [1] * len(example["answer"])}
               for example in examples]
    trainer = SFTTrainer(
        model=base, args=training.one_process(args), train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer, callbacks=[clock], peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout,
            bias="none", target_modules=models.lora_targets(base, cfg.target_modules)))
    trainer.remove_callback(transformers.PrinterCallback)
    if compute == "fp32":  # TRL has put the adapter into bf16, which hardware without it would emulate
        for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
            parameter.data = parameter.data.float()
    trainer.train()
    return trainer.model


def measure(variant: str, model: str, rows: int, steps: int) -> dict:
    """Figures of one training."""
    profile = "gpu" if measured.has_gpu() else "cpu"
    cfg = knobs.config_of(
        step.Config, task.PROFILES[profile] | step.PROFILES[profile], model=model, batch_size=rows,
        max_steps=steps, warmup_steps=1, log_every=1, eval_every=10 * steps, **KNOBS.get(variant, {}))
    pool = rows_of(cfg)
    drawn = random.Random(cfg.seed).sample(pool, min(len(pool), steps * rows))  # as in 03
    examples = step.schedule(task.encode(models.load_tokenizer(model), drawn, cfg), cfg)
    lengths = [len(example["prompt"]) + len(example["answer"]) for example in examples]
    clock, recorded, record = measured.Clock(), set(), Graphs.record

    def noted(*args):
        recorded.add(len(clock.marks) - 1)
        return record(*args)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Graphs, "record", noted):
        if variant in KNOBS:
            trained, _, _ = step.train(cfg, pool, pool[-4:], Path(folder, "checkpoints"), "",
                                       lambda **values: None, callbacks=[clock])
        else:
            trained = trl(cfg, examples, folder, clock, variant == TRL_LIGER)
    fused = sum((getattr(module.forward, "__module__", "") or "").startswith("liger_kernel")
                for module in trained.modules())
    if bool(fused) != (measured.has_gpu() and is_liger_kernel_available()
                       and (variant == TRL_LIGER or (variant in KNOBS and cfg.liger))):
        raise SystemExit(f"{variant}: {fused} modules run Liger's kernels")
    counts = [sum(lengths[i:i + rows]) for i in range(0, len(lengths), rows)]
    return clock.values("tokens", counts, recorded) | {"liger_modules": fused, "graphs": len(recorded)}


def main() -> None:
    measured.need("trl", "trl")
    gpu = measured.has_gpu()
    defaults = (dict(model="embedded-2b", rows=[8, 32, 64, 128], steps=40, repeat=1) if gpu else
                dict(model="embedded-135m", rows=[8], steps=10, repeat=3))
    args = measured.arguments(__doc__, **defaults)
    if args.variant:
        return print(json.dumps(measure(args.variant, args.model, *args.rows, args.steps)))
    names = [TRL, OURS]
    if gpu:
        names = [TRL, TRL_LIGER, *KNOBS] if is_liger_kernel_available() else [TRL, "ours, launched", OURS]
    table = measured.each(__file__, {name: name not in KNOBS for name in names}, args, SPEED)
    settings = {"model": results.public(args.model), "steps": args.steps, "repeat": args.repeat,
                "compute": models.compute_name(), "threads": torch.get_num_threads()}
    measured.write("decoder", settings, table, SPEED)


if __name__ == "__main__":
    main()
