"""Question: what do 4-bit weights and 0.66 million LoRA parameters learn about search in minutes?

Reads   runs/<run>/task2_encoder/{train,dev}.jsonl of 01
Writes  results/<run>/task2_encoder/03_train.json, runs/<run>/task2_encoder/{adapter/,merged/,checkpoints/}
Needs   about 2 min and 4 GB on 2 cores; interrupted (Ctrl-C, kill, power), the same command resumes from the last checkpoint

On N GPUs, `torchrun --nproc_per_node N --` in place of `python` deals every batch out to N processes and trains the same: without bf16
the losses of one and two processes agree to 1e-6 (measured on CPUs), with it to 0.003.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's modules, not another's

from common import results

if __name__ == "__main__":
    results.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

from dataclasses import dataclass

from common import trainer as trainer_common
from task2_encoder import task, training


@dataclass(frozen=True)
class Config(task.Config):
    # -- the frozen base: precision, double_quant and compute are in task.py --
    # Dropout inside the frozen base while training. Off: no pair is seen twice in the CPU run, and drawing the masks took a third of a step on a CPU.
    base_dropout: float = 0.0

    # -- the adapter --
    # Rank, a cap on capacity: 16 x (in + out) weights a layer, 0.66M in all, 2.9 % of the model.
    lora_r: int = 16
    # The update is scaled by alpha / r = 2, the common default. It acts like a learning rate: tune that one, keep this.
    lora_alpha: int = 32
    # Nothing is seen twice in the CPU run, so there is nothing to overfit. 0.05 once the same pairs come back for several epochs.
    lora_dropout: float = 0.0
    # Every linear layer but the pooler, attention and MLP: the one choice the QLoRA paper found critical
    # (fig. 2). Or names separated by commas (BERT's are query,key,value,dense); a wrong one is answered with
    # the model's.
    target_modules: str = "all-linear"

    # -- the optimiser of MultipleNegativesRankingLoss, in both directions, averaged; scale is in task.py --
    # Fifty times what full fine-tuning of such encoders takes (2e-5), because A x B starts at zero and the run is short. After 160 steps,
    # MRR@10 among 1,500 dev functions was 0.620 at 5e-4, 0.629 at 1e-3 and 0.619 at 2e-3; one run each.
    learning_rate: float = 1e-3
    # 96 x 32 = 3,072 of 18,310 pairs, 90 s on 2 cores. Runs of 144 and 160 had nearly all their gain on dev by step 48; what follows moves up
    # and down by 0.01, the noise of 400 functions.
    max_steps: int = 96
    # 31 negatives a pair. At the same number of pairs, 80 steps of 64 reached 0.624 where 160 of 32 reached
    # 0.629 (1,500 dev functions, one run each): no reason for more on a CPU. On a GPU use 128: small batches
    # leave it idle.
    batch_size: int = 32
    # Cut batches inside one package: a search has to tell functions of one library apart, and those are harder negatives than functions of
    # another. 0.617 with it, 0.610 without (1,483 dev functions, one run each: a hint, not a proof; make ablations has the test).
    same_package: bool = True
    # Falls to zero, so that late steps do not undo each other; the adapter kept is often an earlier one.
    schedule: str = "cosine"
    # 5 % of the steps: Adam's statistics are unreliable in the first steps.
    warmup_steps: int = 5
    # Norms run at 0.7-1.8 here, so 1.0, the library's default, trims most steps a little and caps the outliers. Untuned.
    max_grad_norm: float = 1.0
    # The adapter starts as no change and sees no pair more than twice: nothing to shrink.
    weight_decay: float = 0.0
    # The state is 2 x 4 bytes x 0.66M = 5 MB: nothing to page out, no reason for 8 bits.
    optimizer: str = "adamw_torch_fused"

    # -- memory --
    # Rows of a batch computed at once, 0 = as many as fit. Fewer train the same, negatives included, but
    # compute every row twice: CachedMultipleNegativesRankingLoss (GradCache: Gao et al. 2021,
    # arXiv:2101.06983). 8 of 32 took 1.4 times as long on a CPU.
    rows_per_pass: int = 0

    # -- watching it --
    # Steps between evaluations of dev MRR@10, which pick the adapter; each costs 5 s on 2 cores. Checkpoints
    # are written at the same steps.
    eval_every: int = 32
    # Steps between log lines: one every 10 s.
    log_every: int = 10
    # Processes that cut the next batches into tokens meanwhile. On a CPU they would take the cores that train.
    workers: int = 0
    # Batches cut from one span of shuffled rows, which is sorted inside: similar lengths meet. 11 % of tokens are padding with this span,
    # 29 % with 32; a longer one leaves less to chance.
    bucket: int = 256


PROFILES = {
    "smoke": dict(
        max_steps=4,  # proves the path
        batch_size=8,  # same
        eval_every=2,  # two evaluations and two checkpoints
        log_every=1,  # short
        warmup_steps=1,  # of 4 steps
    ),
    "cpu": dict(),
    "gpu": dict(
        max_steps=300,  # two epochs of about 18,000 pairs; in a run of four dev rose by 0.01 from step 100 to 200, while the loss fell by a third
        batch_size=128,  # 127 negatives a pair, and a GPU kept busy
        warmup_steps=15,  # 5 %
        lora_dropout=0.05,  # pairs come back
        learning_rate=5e-4,  # more steps want smaller ones; untuned
        eval_every=50,  # six evaluations
        workers=4,  # cutting 256 texts takes 0.08 s, and a step took 0.25 s with it
    ),
}


def main(run):
    cfg = run.cfg
    data = run.load("01_data")
    rows, dev = (results.read_rows(run.artifact("01_data", f"{name}.jsonl")) for name in ("train", "dev"))
    model, facts, history = training.train(cfg, rows, dev, run.folder / "checkpoints", results.result_hash(data), run.log)
    trainer_common.finish()
    if not results.MAIN_PROCESS:
        return  # all have the same weights: the first saves them
    facts |= training.save(model, cfg, run.folder, [row["positive"] for row in dev[:64]])
    table = [{"table": "curve", "model": "tuned", "metric": m, "step": h["step"], "value": h[m]}
             for h in history for m in ("loss", "eval_mrr@10") if m in h]
    table += [{"table": "training", "model": "tuned", "metric": k, "value": v} for k, v in facts.items()]
    run.save(table, artifacts=["adapter", "merged"], tokens_per_second=facts["tokens_per_second"])
    trainer_common.remove(run.folder / "checkpoints")
    run.log(dev_mrr_before=facts["dev_mrr_before"], dev_mrr_kept=facts["dev_mrr_kept"], kept_step=facts["kept_step"])


if __name__ == "__main__":
    results.start(main, Config, task.PROFILES, PROFILES)
