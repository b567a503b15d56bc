"""Question: what do 4-bit weights and a few million LoRA parameters learn in minutes?

Reads   runs/<run>/task1_decoder/{train,dev}.jsonl of 01
Writes  results/<run>/task1_decoder/03_train.json, runs/<run>/task1_decoder/{adapter/,checkpoints/}
Needs   about 3 min and 4.5 GB on 2 cores; interrupted (Ctrl-C, kill, power), the same command resumes from the last checkpoint
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # a wrong one is said before the seconds that the next imports take

import shutil
from dataclasses import dataclass

from common import models, trainer
from task1_decoder import task, training


@dataclass(frozen=True)
class Config(task.Config):
    # -- the adapter --
    # Rank, a cap on capacity: 16 x (in + out) weights a layer, 4.9M in all, 3.6 % of the model. Rank hardly mattered in the QLoRA
    # paper once all layers had one; raise it when more epochs stop lowering the training loss.
    lora_r: int = 16
    # The update is scaled by alpha / r = 2, the common default. It acts like a learning rate: tune that one, keep this.
    lora_alpha: int = 32
    # Nothing is seen twice in the CPU run, so there is nothing to overfit. 0.05 once the same rows come back for several epochs.
    lora_dropout: float = 0.0
    # Every linear layer but the head, attention and MLP: the one choice the QLoRA paper found critical (fig. 2). PEFT finds them in
    # any architecture; or names separated by commas, or a regular expression.
    target_modules: str = "all-linear"

    # -- the optimiser --
    # Ten times the paper's 2e-4, because the model is small and the run is 75 steps, not 1,875: 96 steps took the dev loss from 4.20 to
    # 3.13 at 1e-3 and to 3.11 at 2e-3. Halve it if the loss jumps after warm-up, and for models above 1B.
    learning_rate: float = 2e-3
    # 75 x 8 = 600 rows of 16,500: what 3 minutes on 2 cores afford at 2.2 s a step. A run of 90 had dev 3.00 at step 60 and 2.98 at its
    # end: longer runs on these rows gain little. PROFILE=gpu sees 12,800 rows, 0.8 of an epoch.
    max_steps: int = 75
    # Small, because steps are few: at the same 1,152 rows, 144 steps of 8 reached dev 3.09 where 72 of 16 reached 3.11.
    batch_size: int = 8
    # Falls to zero, so the last steps average out the noise of small batches; the paper's constant rate needs thousands of steps.
    schedule: str = "cosine"
    # About 5 % of the steps: Adam's statistics are unreliable in the first steps.
    warmup_steps: int = 4
    # Norms run at 0.9-2.0 here, so 1.0, the library's default, trims most steps a little and caps the outliers. The paper's
    # 0.3 would leave only the direction; untuned.
    max_grad_norm: float = 1.0
    # The adapter starts as no change and sees no row twice: nothing to shrink.
    weight_decay: float = 0.0
    # The state is 2 x 4 bytes x 4.9M = 39 MB: nothing to page out, and 8 bits would save 29 MB. Fused took 16 ms of a 2.4 s step, plain
    # 30 ms (measured, 2 cores). paged_adamw_8bit is for full fine-tuning.
    optimizer: str = "adamw_torch_fused"

    # -- memory --
    # Rows of a batch computed at once, 0 = as many as fit; the others follow by gradient accumulation, which trains the same.
    rows_per_pass: int = 0
    # Compute activations again in the backward pass instead of keeping them: a third more arithmetic for a fraction of their memory.
    # "auto" turns it on when an eighth of the batch does not fit without; make ablations PROFILE=gpu measures "on" and "off".
    gradient_checkpointing: str = "auto"

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
        max_steps=400,  # 12,800 of 16,500 rows, each once: three minutes on a big GPU
        batch_size=32,  # keeps a big GPU busy; gradients less noisy
        learning_rate=5e-4,  # larger models want less: 2.669 from 5.127 in 120 steps in a first trial of this size; untuned otherwise
        warmup_steps=20,  # 5 %
        eval_every=100,  # four readings
        log_every=10,  # forty lines
    ),
}


def main(run):
    cfg, data = run.cfg, run.load("01_data")
    pool, dev = (results.read_rows(run.artifact("01_data", f"{split}.jsonl")) for split in ("train", "dev"))
    checkpoints, adapter = run.folder / "checkpoints", run.folder / "adapter"
    model, facts, history = training.train(cfg, pool, dev, checkpoints, [results.result_hash(data)], run.log)
    if not results.MAIN_PROCESS:
        return
    shutil.rmtree(adapter, ignore_errors=True)
    # adapter and card name the base as it is known elsewhere, not by its folder on this machine
    base, config = model.get_base_model(), model.peft_config["default"]
    base.name_or_path, config.revision = models.public_name(cfg.model)
    config.base_model_name_or_path = base.config.name_or_path = base.name_or_path
    model.save_pretrained(adapter, save_embedding_layers=False)
    models.load_tokenizer(cfg.model).save_pretrained(adapter)  # with its chat template: the folder is all that a user of it needs
    facts |= {"adapter_file_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
              "reload_max_logit_difference": training.check_reload(cfg, model, adapter, dev[:4])}
    rows = [{"table": "curve", "model": "tuned", "metric": m, "step": h["step"], "value": h[m]}
            for h in history for m in ("loss", "eval_loss") if m in h]
    rows += [{"table": "training", "model": "tuned", "metric": name, "value": value} for name, value in facts.items()]
    run.save(rows, artifacts=["adapter"], tokens_per_second=facts["tokens_per_second"])
    trainer.remove(checkpoints)
    run.log(dev_nll_before=facts["dev_nll_before"], dev_nll_best=facts["dev_nll_best"], steps=facts["steps"])


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
