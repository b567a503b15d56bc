"""Question: what do 4-bit weights and 0.66 million LoRA parameters learn about search in minutes?

Reads   runs/<run>/task2_encoder/{train,dev}.jsonl of 01
Writes  results/<run>/task2_encoder/03_train.json, runs/<run>/task2_encoder/{adapter/,merged/,checkpoints/}
Needs   about 2 min and 3 GB on 2 cores; interrupted (Ctrl-C, kill, power), the same command resumes from the
        last checkpoint

On N GPUs, `torchrun --nproc_per_node N --` in place of `python` splits every batch among N processes and
trains the same: without bf16 the losses of one and two processes agree to 1e-6 (measured on CPUs), with it to
0.003.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import shutil
import time
from dataclasses import dataclass
from itertools import chain

import torch
from datasets import Dataset
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import cos_sim
from torch.utils.data import BatchSampler
from transformers import PrinterCallback

from common import models, training
from common.stats import facts
from sources import pretrained
from task2_encoder import batches, task


@dataclass(frozen=True)
class Config(task.Config):
    # -- the frozen base: precision, double_quant and compute are in task.py --
    # Dropout inside the frozen base while training. Off: no pair is seen twice in the CPU run, and drawing
    # the masks took a third of a step on a CPU.
    base_dropout: float = 0.0

    # -- the adapter --
    # Rank, a cap on capacity: 16 x (in + out) weights a layer, 0.66M in all, 2.9 % of the model. For 4 no
    # difference is shown (make ablations).
    lora_r: int = 16
    # The update is scaled by alpha / r = 2, the common default. It acts like a learning rate: tune that one.
    lora_alpha: int = 32
    # Nothing is seen twice in the CPU run, so there is nothing to overfit. 0.05 once the same pairs come back
    # for several epochs.
    lora_dropout: float = 0.0
    # Every linear layer but the pooler, attention and MLP: the one choice the QLoRA paper found critical
    # (fig. 2). Or names separated by commas (BERT's are query,key,value,dense); a wrong one is answered with
    # the model's.
    target_modules: str = "all-linear"

    # -- the optimiser; the scale of the loss is in task.py --
    # Fifty times what full fine-tuning of such encoders takes (2e-5), because A x B starts at zero and the
    # run is short. After 160 steps of an earlier run, MRR@10 among 1,500 dev functions was 0.620 at 5e-4,
    # 0.629 at 1e-3 and 0.619 at 2e-3; one run each. 5e-4 on a GPU, untuned: there 1e-4 to 1e-3 end within
    # 0.01 of each other (make ablations).
    learning_rate: float = 1e-3
    # 96 x 32 = 3,072 of 17,762 pairs, 100 s on 2 cores. Earlier runs of 144 and 160 steps had nearly all
    # their gain on dev by step 48; what follows moves up and down by 0.01, the noise of 400 functions. On a
    # GPU 300 x 128 are two epochs in a minute: dev MRR@10 is 0.492 before, 0.591 at step 50, 0.608 in the
    # end.
    max_steps: int = 96
    # 31 negatives a pair. For half the batch in twice the steps no difference is shown (make ablations). 128
    # on a GPU: small batches leave it idle.
    batch_size: int = 32
    # Fill batches from one package, whose functions are the harder negatives. Without it MRR@10 is 0.005
    # lower on a CPU and 0.002 on a GPU, no difference shown (make ablations). The hardest, neighbours in one
    # module, took about 0.024 off it in an earlier run. Own data is one package.
    within_package: bool = True
    # Falls to zero, so that late steps do not undo each other.
    schedule: str = "cosine"
    # 5 % of the steps: Adam's statistics are unreliable in the first steps.
    warmup_steps: int = 5
    # Norms run at 0.6-2.4 here, so 1.0, the library's default, trims most steps a little and caps the
    # outliers. Untuned.
    max_grad_norm: float = 1.0
    # The adapter starts as no change and sees few pairs more than twice: nothing to shrink.
    weight_decay: float = 0.0
    # The state is 2 x 4 bytes x 0.66M = 5 MB: nothing to page out, no reason for 8 bits.
    optimizer: str = "adamw_torch_fused"

    # -- memory --
    # Rows of a batch computed at once, 0 = as many as fit. Fewer train the same, negatives included, but
    # compute every row twice: CachedMultipleNegativesRankingLoss (GradCache: Gao et al. 2021,
    # arXiv:2101.06983). 8 of 32 took 1.4 times as long on a CPU.
    rows_per_pass: int = 0
    # GiB of memory to plan for, 0 = what is free: fewer rows are computed at once to stay below.
    memory_gib: float = 0.0

    # -- watching it --
    # Steps between evaluations of dev MRR@10, which pick the adapter; each costs 5 s on 2 cores. Checkpoints
    # are written at the same steps. Shares of the kept adapter (0.5, 0.75, 1), chosen on dev as well, were
    # never better than the whole by more than 0.002.
    eval_every: int = 32
    # Steps between log lines: one every 10 s.
    log_every: int = 10
    # Processes that tokenise the next batches meanwhile. On a CPU they would take the cores that train.
    workers: int = 0
    # Batches filled from one span of shuffled rows, which is sorted inside: similar lengths meet. 11 % of
    # tokens are padding with this span, 29 % with 32; a longer one leaves less to chance.
    bucket: int = 256


PROFILES = {
    "smoke": dict(max_steps=4, batch_size=8, eval_every=2, log_every=1, warmup_steps=1),
    "cpu": dict(),
    "gpu": dict(
        max_steps=300,  # two epochs of 17,762 pairs
        batch_size=128,  # small batches leave a GPU idle
        warmup_steps=15,  # 5 %
        lora_dropout=0.05,  # pairs come back
        learning_rate=5e-4,  # untuned
        eval_every=50,  # six times
        workers=4,  # tokenising 256 texts takes 0.08 s, and a step took 0.25 s with it
    ),
}


# ------------------------------------------------------------------------------------------ model and loss

def load_model(cfg, method: str):
    """The encoder that will train: "qlora" is LoRA over the base in the knob's `precision` (4 bits), "lora"
    over the fp32 base, and "full" trains all weights of the fp32 base.

    SystemExit if the encoder has trained parts after its pooling, which the saved adapter would not carry.
    """
    model = task.load_encoder(cfg, cfg.precision if method == "qlora" else "fp32")
    if others := {type(module).__name__ for module in model} - {"Transformer", "Pooling", "Normalize"}:
        raise SystemExit(f"MODEL={cfg.model}: its {', '.join(others)} module is not covered by an adapter on "
                         "the transformer; take an encoder of Transformer, Pooling and Normalize alone")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = cfg.base_dropout
    for name, parameter in model.named_parameters():  # mean pooling never runs the pooler
        parameter.requires_grad = method == "full" and "pooler" not in name
    if method != "full":
        has_pooler = getattr(model.transformers_model, "pooler", None) is not None
        targets = models.lora_targets(model.transformers_model, cfg.target_modules, skip=("pooler",))
        torch.manual_seed(cfg.seed)  # LoRA's A is drawn by add_adapter; bias: none is trained, its usual way
        model.add_adapter(LoraConfig(
            task_type="FEATURE_EXTRACTION", r=cfg.lora_r, lora_alpha=cfg.lora_alpha,
            lora_dropout=cfg.lora_dropout, bias="none", target_modules=targets,
            exclude_modules=["pooler.dense"] if has_pooler else None))
        for parameter in trained(model).values():
            parameter.data = parameter.data.float()  # bf16 rounds away a step of 1e-4 on a weight of 0.05
    return model


def trained(model) -> dict:
    """What training moves, by name: LoRA's matrices, or all weights."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def contrastive_loss(model, scale: float, rows_at_once: int | None = None):
    """Cross-entropy of picking a pair's other side among the batch, in both directions, averaged.

    "per_direction": the softmax of a query is over documents, that of a document over queries. With several
    processes, all their batches count. With `rows_at_once` the batch is computed in parts, to the same loss
    and gradients (GradCache).
    """
    options = dict(scale=scale, similarity_fct=cos_sim_fp32, directions=("query_to_doc", "doc_to_query"),
                   partition_mode="per_direction", gather_across_devices=training.PROCESSES > 1)
    if rows_at_once:
        return CachedMultipleNegativesRankingLoss(model, mini_batch_size=rows_at_once, **options)
    return MultipleNegativesRankingLoss(model, **options)


def cos_sim_fp32(a, b):
    """Cosine similarities outside autocast: bf16 cannot tell apart two scores near 0.5 that differ by 0.002,
    and times 20 that is 0.04 nats."""
    with torch.autocast(a.device.type, enabled=False):
        return cos_sim(a.float(), b.float())


# ------------------------------------------------------------------------------------------------ training

class Trainer(SentenceTransformerTrainer):
    """The library's trainer with checkpoints that hold what was trained.

    The library would reload a checkpoint by rebuilding the model without its quantisation
    (sentence-transformers 6.2, base/trainer.py), which fails over a 4-bit base.
    """

    def add_model_card_callback(self, default_args_dict):
        pass  # its statistics of the data take longer than some runs

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(trained(self.model), Path(output_dir) / "trained.safetensors")

    def _load_from_checkpoint(self, checkpoint_path):
        self.model.load_state_dict(load_file(Path(checkpoint_path) / "trained.safetensors"), strict=False)


def train(cfg, rows: list, dev: list, checkpoints: Path, data_hash: str, log, method: str = "qlora"):
    """Train on `rows` and keep the weights of the evaluation with the best dev MRR@10 after step 0.

    Returns (model in eval mode, training stats, the library's log history). `method` is as in `load_model`.
    The same call resumes from the last checkpoint unless knobs, method or data (`data_hash`) changed; the
    caller removes `checkpoints` once it has saved what it wants.
    """
    per_process = training.per_process(cfg.batch_size)
    if models.device().type == "cuda":
        torch.cuda.set_device(models.device())  # bitsandbytes quantises on the current one
    model = load_model(cfg, method)

    # also starts the process group, through which `batches.rows_at_once` asks the other processes
    last = training.open_checkpoints(checkpoints, [vars(cfg), data_hash, method])
    lengths = batches.token_lengths(model, rows)
    order = batches.schedule(rows, lengths, cfg)
    rows_at_once, predicted = batches.rows_at_once(model, cfg, rows, lengths, per_process)
    runner.FACTS["predicted_GiB"] = predicted / 2**30  # for the line that says it was not enough
    pairs = len(order) * cfg.batch_size
    stats = {"trainable_parameters": sum(parameter.numel() for parameter in trained(model).values()),
             "steps": len(order), "trained_pairs": pairs, "epochs": pairs / len(rows),
             "rows_per_pass": rows_at_once, "predicted_total_bytes": predicted}
    log(method=method, rows=len(rows), **stats)

    search = task.retrieval(dev)

    def dev_mrr(model, *_) -> dict:
        vectors = task.embed(model, search, cfg.eval_batch_size)
        return {"mrr@10": task.mean_mrr(task.evaluate(search, task.by_cosine(search, vectors)))}

    eval_every = min(cfg.eval_every, cfg.max_steps)
    args = training.one_process(SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints), max_steps=cfg.max_steps,
        learning_rate=cfg.learning_rate, lr_scheduler_type=cfg.schedule, warmup_steps=cfg.warmup_steps,
        max_grad_norm=cfg.max_grad_norm, weight_decay=cfg.weight_decay, optim=cfg.optimizer, seed=cfg.seed,
        prompts={side: model.prompts[kind] for side, kind in task.SIDES.items()},
        # every process takes its part of the same global batch
        per_device_train_batch_size=per_process, accelerator_config={"split_batches": True},
        # the order of `batches.schedule`, whatever sampler the library would make
        batch_sampler=lambda *_, **__: BatchSampler(list(chain(*order)), cfg.batch_size, drop_last=True),
        # the best and the last checkpoint are kept
        eval_strategy="steps", eval_steps=eval_every, eval_on_start=not last, metric_for_best_model="mrr@10",
        save_steps=eval_every, save_total_limit=2,
        logging_steps=cfg.log_every, dataloader_num_workers=cfg.workers, ddp_find_unused_parameters=False,
        **training.options(models.arithmetic(cfg.precision, cfg.compute))))
    trainer = Trainer(
        model=model, args=args, evaluator=[dev_mrr],
        train_dataset=Dataset.from_dict({side: [row[side] for row in rows] for side in task.SIDES}),
        loss=contrastive_loss(model, cfg.scale, rows_at_once if rows_at_once < per_process else None),
        callbacks=[training.Log(log, ("loss", "eval_mrr@10", "learning_rate", "grad_norm")),
                   *training.tensorboard(checkpoints.with_name("tensorboard"))])
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    with disable_input_dtype_casting(model):  # autocast would undo it at once: 12 % of a step on a CPU
        trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - started
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else it stays under autocast
    trainer.accelerator.wait_for_everyone()  # the first process wrote what all read now
    trainer._load_from_checkpoint(trainer.state.best_model_checkpoint)

    history = trainer.state.log_history
    mrr = [entry["eval_mrr@10"] for entry in history if "eval_mrr@10" in entry]
    tokens = sum(sum(lengths[i]) for i in chain(*order))
    stats |= {"trained_tokens": tokens, "processes": training.PROCESSES,
              "kept_step": trainer.state.best_global_step, "dev_mrr_before": mrr[0],
              "dev_mrr_kept": trainer.state.best_metric, "dev_mrr_last": mrr[-1],
              "measured_peak_bytes": runner.peak_memory(),
              "training_seconds": None if last else seconds,  # nobody knows those before a resumption
              "tokens_per_second": None if last else tokens / seconds}
    return model.eval(), stats, history


# ------------------------------------------------------------------------------------------- what is saved

def save(model, cfg, folder: Path, search: task.Retrieval) -> dict:
    """Write `folder`/adapter (to open with its base, see `task.load_adapter`) and `folder`/merged (opens
    anywhere).

    Returns what reloading the adapter showed on the texts of `search`; SystemExit if it does not reload
    exactly, or reloads as the base: what nobody has reloaded is not saved.
    """
    for name in ("adapter", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    config = model.transformers_model.peft_config["default"]
    if not isinstance(config.target_modules, str):  # PEFT's set has another order in every process
        config.target_modules = sorted(config.target_modules)
    config.base_model_name_or_path = None  # with a name, PEFT asks a hub whether the vocabulary has grown
    model.save_pretrained(str(folder / "adapter"), create_model_card=False)
    config.base_model_name_or_path, config.revision = pretrained.public_name(cfg.model)
    config.save_pretrained(folder / "adapter")

    encoders = model, task.load_adapter(folder / "adapter", cfg), task.load_encoder(cfg)
    ours, reloaded, base = (task.embed(encoder, search, cfg.eval_batch_size) for encoder in encoders)
    difference, moved = task.largest_difference(ours, reloaded), task.largest_difference(reloaded, base)
    if difference != 0 or moved == 0:
        raise SystemExit(f"{results.shown(folder / 'adapter')} reloads wrongly: embeddings differ by "
                         f"{difference}, from the base's by {moved}")

    whole = task.load_adapter(folder / "adapter", cfg, "fp32")  # never merged into 4 bits, which would round
    whole[0].model = whole[0].model.merge_and_unload()
    whole.save_pretrained(str(folder / "merged"), create_model_card=False)
    return {"reload_difference": difference, "reload_minus_base": moved}


def main(run):
    cfg, data = run.cfg, run.load("01_data")
    rows, dev = map(run.rows, ("train", "dev"))
    checkpoints = run.folder / "checkpoints"
    model, stats, history = train(cfg, rows, dev, checkpoints, results.result_hash(data), run.log)
    training.finish()
    if not runner.MAIN_PROCESS:
        return  # all have the same weights, and the first process saves them
    stats |= save(model, cfg, run.folder, task.retrieval(dev[:64]))
    table = []
    for entry in history:
        read = {metric: entry[metric] for metric in ("loss", "eval_mrr@10") if metric in entry}
        table += facts("curve", "tuned", read, step=entry["step"])
    table += facts("training", "tuned", stats)
    run.save(table, artifacts=["adapter", "merged"], tokens_per_second=stats["tokens_per_second"])
    training.remove(checkpoints)
    run.log(**{name: stats[name] for name in ("dev_mrr_before", "dev_mrr_kept", "kept_step")})


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
