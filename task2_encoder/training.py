"""What 03_train.py and ablations.py share: the order of pairs, the adapter, the memory, the Trainer."""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import batch_to_device, cos_sim
from transformers import PrinterCallback

from common import memory, models, results
from common import trainer as trainer_common
from task2_encoder import task

# anchor -> positives and positive -> anchors, a softmax each, averaged
SYMMETRIC = dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")


# ---------------------------------------------------------------------------------------------------------------- order of pairs

def schedule(rows: list[dict], max_steps: int, batch_size: int, bucket: int, same_package: bool, seed: int) -> list[list[int]]:
    """Indices of every step's batch: epochs of shuffled batches of similar length, in which no group stands twice.

    `rows`: {"group", "package", "lengths": (anchor, positive)}. In a span of `bucket` batches rows are sorted by package (if
    `same_package`) and the positive's length, runs of 4 batches again by the anchor's, so both columns pad little; the batches of a
    span are then shuffled. Rows that fit no full batch of a span are left to the next epoch's draw. ValueError if not even one batch
    can be filled.
    """
    rng, batches = random.Random(seed), []
    while len(batches) < max_steps:
        before, order = len(batches), rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), bucket * batch_size):
            span = sorted(order[start:start + bucket * batch_size],
                          key=lambda i: (rows[i]["package"] if same_package else "", rows[i]["lengths"][1]))
            runs = [sorted(span[i:i + 4 * batch_size], key=lambda i: rows[i]["lengths"][0]) for i in range(0, len(span), 4 * batch_size)]
            cut = [batch for run in runs for batch in cut_by_group(run, rows, batch_size)]
            batches += rng.sample(cut, len(cut))
        if len(batches) == before:
            raise ValueError(f"no batch of {batch_size} rows with {batch_size} different groups among {len(rows)} rows")
    return batches[:max_steps]


def cut_by_group(order: list[int], rows: list[dict], size: int) -> list[list[int]]:
    """Full batches of `size`, in order; a row whose group the batch already holds waits for the next batch."""
    batches = []
    while len(order) >= size:
        batch, groups, waiting = [], set(), []
        for i in order:
            if len(batch) < size and rows[i]["group"] not in groups:
                batch.append(i)
                groups.add(rows[i]["group"])
            else:
                waiting.append(i)
        if len(batch) < size:
            break
        batches.append(batch)
        order = waiting
    return batches


def dealt(batches: list[list[int]]) -> list[list[int]]:
    """Every batch cut into a piece for each process, in order: accelerate gives piece i to process i % PROCESSES."""
    size = trainer_common.share(len(batches[0]))
    return [batch[i:i + size] for batch in batches for i in range(0, len(batch), size)]


class Scheduled(DefaultBatchSampler):
    """A batch sampler that reads the schedule: resuming skips batches, and sees what an uninterrupted run would have seen."""

    def __init__(self, batches: list[list[int]]):
        super().__init__(range(sum(map(len, batches))), batch_size=len(batches[0]), drop_last=False)
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


# ---------------------------------------------------------------------------------------------------------------- model and adapter

def cos_sim_fp32(a, b):
    """Cosine similarities outside autocast: in bf16 two scores near 0.5 that differ by 0.002 are one, and x 20 that is 0.04 nats."""
    with torch.autocast(a.device.type, enabled=False):
        return cos_sim(a.float(), b.float())


def prepare(cfg, method: str):
    """The model that will train: the base of the knob `precision` with LoRA ("qlora"), fp32 base with LoRA
    ("lora"), or all weights of the fp32 base ("full"). SystemExit if the encoder has trained parts after its
    pooling, which the saved adapter would not carry."""
    model = task.load_encoder(cfg, cfg.precision if method == "qlora" else "fp32")
    if others := [type(m).__name__ for m in model if type(m).__name__ not in ("Transformer", "Pooling", "Normalize")]:
        raise SystemExit(f"MODEL={cfg.model}: its {', '.join(others)} module is not covered by an adapter on the transformer; take an encoder "
                         "of Transformer, Pooling and Normalize alone")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = cfg.base_dropout
    if method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "pooler" not in name
        return model
    pooler = ["pooler.dense"] if getattr(model.transformers_model, "pooler", None) else None
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=cfg.lora_r, lora_alpha=cfg.lora_alpha, bias="none",
                        lora_dropout=cfg.lora_dropout, target_modules=targets(model, cfg),
                        exclude_modules=pooler)
    torch.manual_seed(cfg.seed)  # LoRA's A is drawn in the next line
    add_lora(model, config)
    return model


def targets(model, cfg) -> list[str]:
    """Names of the linear layers to adapt: all but the pooler's for "all-linear", else those of the knob.
    SystemExit with the names of this model's layers if one is missing."""
    layers = models.linear_layers(model.transformers_model, skip=("pooler",))
    linear = sorted({name.rsplit(".", 1)[-1] for name in layers})
    wanted = linear if cfg.target_modules == "all-linear" else cfg.target_modules.split(",")
    if missing := [name for name in wanted if name not in linear]:
        raise SystemExit(f"target_modules: no linear layer named {', '.join(missing)} in {cfg.model}; it has "
                         f"{', '.join(linear)}: name some of these, or SET=target_modules=all-linear")
    return wanted


def add_lora(model, config: LoraConfig) -> None:
    """Freeze the base and add LoRA in fp32. The pooler stays as it is: mean pooling never runs it."""
    model.requires_grad_(False)
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # made in the base's dtype: in bf16 a step of 1e-4 on a weight of 0.05 would be rounded away
            parameter.data = parameter.data.float()


def load_adapter(folder: Path, cfg):
    """A fresh base with the adapter saved at `folder`, whose weights stay fp32: a plain load in 4 bits would round them to bf16.

    SystemExit if a matrix of the adapter is missing or has no place: such an adapter would be the identity there, silently.
    """
    model = task.load_encoder(cfg)
    add_lora(model, LoraConfig.from_pretrained(folder))
    report = set_peft_model_state_dict(model.transformers_model, load_file(folder / "adapter_model.safetensors"))
    wrong = [key for key in report.missing_keys if "lora_" in key] + list(report.unexpected_keys)
    if wrong:
        raise SystemExit(f"{results.shown(folder)} does not fit {cfg.model} ({wrong[0]} and {len(wrong) - 1} "
                         "more): train again")
    return model.eval()


def with_peft(folder: Path, cfg):
    """The fp32 base with the adapter at `folder`, opened with plain PEFT as anybody who has the base can."""
    model = task.load_encoder(cfg, "fp32")
    model[0].model = PeftModel.from_pretrained(model[0].model, folder)
    return model.eval()


def save(model, cfg, folder: Path, texts: list[str]) -> dict[str, float]:
    """Write `folder`/adapter (to open with its base, see `with_peft`) and `folder`/merged (opens anywhere).

    Returns what reloading the adapter showed; SystemExit if the adapter does not reload exactly, or reloads
    as the base: a saved thing nobody reloaded is not saved.
    """
    def vectors(encoder):
        return torch.stack(list(task.embed(encoder, dict(enumerate(texts)), "document", cfg.eval_batch_size).values()))
    for name in ("adapter", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    config = model.transformers_model.peft_config["default"]
    config.base_model_name_or_path = None  # with a name, PEFT asks a hub whether the vocabulary has grown
    model.save_pretrained(str(folder / "adapter"), create_model_card=False)
    config.base_model_name_or_path, config.revision = models.public_name(cfg.model)
    config.save_pretrained(folder / "adapter")
    reloaded, base = vectors(load_adapter(folder / "adapter", cfg)), vectors(task.load_encoder(cfg))
    difference, moved = float((reloaded - vectors(model)).abs().max()), float((reloaded - base).abs().max())
    if difference != 0 or moved == 0:
        raise SystemExit(f"{results.shown(folder / 'adapter')} reloads wrongly: embeddings differ by {difference}, from the base's by {moved}")
    whole = with_peft(folder / "adapter", cfg)
    whole[0].model = whole[0].model.merge_and_unload()  # never into 4 bits: rounding
    whole.save_pretrained(str(folder / "merged"), create_model_card=False)
    return {"reload_difference": difference, "reload_minus_base": moved,
            "adapter_file_bytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size}


def trained_state(model) -> dict[str, torch.Tensor]:
    """What training moves, by name: LoRA's matrices, or all weights."""
    return {n: p.detach().cpu().clone().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def set_trained_state(model, state: dict[str, torch.Tensor]) -> None:
    """Put `trained_state` back. KeyError if the names differ: nothing is left at its initial value silently."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if own.keys() != state.keys():
        raise KeyError(f"trained parameters differ: {sorted(own.keys() ^ state.keys())[:4]} ...")
    for name, parameter in own.items():
        parameter.data.copy_(state[name])


# ---------------------------------------------------------------------------------------------------- memory

def plan(model, cfg, longest: dict[str, str], batch: int, log) -> tuple[int, dict[str, int]]:
    """(rows computed at once, predicted bytes of a training step) for a process with `batch` rows of a step.

    Forward passes of the longest query and document, once and twice, show what a row adds. A whole batch
    keeps both sides of its rows; fewer at once (CachedMultipleNegativesRankingLoss) keep one side of them.
    Predicted for 8, 16 and 32 pairs of 128 tokens (embedded-minilm, CPU) were 1.07, 1.32 and 1.83 GiB,
    measured 1.08, 1.24 and 1.73. Left out is what oneDNN keeps on a CPU for each width of a batch: 0.7 GiB
    with 4 of 32 rows at once. SystemExit if not even one row fits.
    """
    def kept(kind: str, rows: int) -> int:
        features = model.preprocess([longest[kind]] * rows, prompt=model.prompts[kind])
        features = batch_to_device(features, model.device)
        return memory.saved_bytes(model, lambda: model(features), models.arithmetic(cfg.precision, cfg.compute))["activations"]
    once, twice = ([kept(kind, rows) for kind in longest] for rows in (1, 2))
    row = [b - a for a, b in zip(once, twice)]
    constant = max(2 * a - b for a, b in zip(once, twice))

    def predicted(rows: int) -> dict[str, int]:
        return memory.predict(model, activations=constant + rows * (sum(row) if rows == batch else max(row)))
    free, gib = models.free_memory(cfg.memory_gib), 2**30
    sizes = [batch >> halvings for halvings in range(batch.bit_length())]
    fitting = max((rows for rows in sizes if memory.fits(predicted(rows), free)), default=0)
    fitting = min(gather_object([fitting]))  # processes exchange embeddings: all compute as many at once
    rows = min(cfg.rows_per_pass, batch) or fitting
    if not rows:
        needed = predicted(1)["total"] - predicted(1)["resident"]
        raise SystemExit(f"one row at once needs {needed / gib:.2f} GiB more than is in use, "
                         f"{free / gib:.2f} are free: take a smaller MODEL= or fewer max_tokens; "
                         "SET=rows_per_pass=1 tries all the same")
    chosen, whole = predicted(rows), predicted(batch)
    log(rows_per_pass=rows, batch=batch, predicted_GiB=chosen["total"] / gib,
        whole_batch_GiB=whole["total"] / gib, resident_GiB=chosen["resident"] / gib, free_GiB=free / gib)
    return rows, chosen


# ---------------------------------------------------------------------------------------------------------------- training

def cast_inputs(model, on: bool) -> None:
    """Whether LoRA layers cast their input to the dtype of their weights. Needed without autocast; under it the cast would be undone at
    once: 12 % of a training step on a CPU (measured, 32 pairs)."""
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = on


class Trainer(SentenceTransformerTrainer):
    """The library's trainer, with dev MRR@10 as evaluation, the best weights kept by hand, and checkpoints that hold what was trained.

    By hand, because load_best_model_at_end and resuming rebuild the model without its quantisation, fail to load the checkpoint into
    it and only log that (sentence-transformers 6.2, base/trainer.py).
    """

    def __init__(self, *args, batches, dev, cfg, best: Path, **kwargs):
        self.batches, self.dev, self.cfg, self.best = batches, task.retrieval(dev), cfg, best
        super().__init__(*args, evaluator=task.Evaluator(self.dev), **kwargs)

    def get_batch_sampler(self, dataset, **kwargs):
        return Scheduled(dealt(self.batches))

    def add_model_card_callback(self, default_args_dict):
        pass  # its statistics of the data take longer than some runs

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The same by every process, on the model inside DistributedDataParallel; the first one saves."""
        cast_inputs(self.model, True)
        vectors = task.embed_task(self.model.eval(), self.dev, self.cfg.eval_batch_size)
        cast_inputs(self.model.train(), False)
        metrics = {"eval_mrr@10": self.evaluator.compute_all_metrics(vectors)["cosine"]["mrr@k"][10]}
        looks = [h["eval_mrr@10"] for h in self.state.log_history if "eval_mrr@10" in h and h["step"]]
        better = self.state.global_step and metrics["eval_mrr@10"] > max(looks, default=-1)  # never step 0: a training that harms must show
        if better and self.is_world_process_zero():
            save_file(trained_state(self.model), self.best)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(trained_state(self.model), Path(output_dir) / "trained.safetensors")

    def _load_from_checkpoint(self, checkpoint_path):
        set_trained_state(self.model, load_file(Path(checkpoint_path) / "trained.safetensors"))


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    """Every anchor with the positive of another row of its package: the same texts and batches, but nothing belongs together."""
    rng, members = random.Random(seed), {}
    for i, row in enumerate(rows):
        members.setdefault(row["package"], []).append(i)
    mixed = list(rows)
    for own in members.values():
        for i, j in zip(own, rng.sample(own, len(own))):
            mixed[i] = rows[i] | {"positive": rows[j]["positive"], "group": rows[i]["id"]}
    return mixed


def train(cfg, rows: list[dict], dev: list[dict], checkpoints: Path, data_hash: str, log, method: str = "qlora"):
    """Train on `rows`, keep the weights of the look with the best dev MRR@10 after step 0. Returns (model with them, facts, history).

    `cfg` has the knobs of 03_train.py, `method` is as in `prepare`. The same call goes on from the last
    checkpoint unless knobs, method or data (`data_hash`) changed; the caller calls `remove` on `checkpoints`
    when what it wants is saved. SystemExit if there are fewer groups than rows in a batch.
    """
    per_process, groups = trainer_common.share(cfg.batch_size), len({row["group"] for row in rows})
    if groups < cfg.batch_size:
        raise SystemExit(f"{groups} different groups to train on, a batch of {cfg.batch_size} rows needs as many: "
                         f"SET=batch_size={max(2, groups // 2)}")
    if models.device().type == "cuda":
        torch.cuda.set_device(models.device())  # bitsandbytes quantises on the current one
    model, sides = prepare(cfg, method), {"anchor": "query", "positive": "document"}
    limits = dict(truncation=True, max_length=model.max_seq_length)
    ids = [model.tokenizer([model.prompts[kind] + r[side] for r in rows], **limits).input_ids
           for side, kind in sides.items()]
    for row, *both in zip(rows, *ids):
        row["lengths"] = tuple(map(len, both))
    batches = schedule(rows, cfg.max_steps, cfg.batch_size, cfg.bucket, cfg.same_package, cfg.seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(method=method, trainable=trainable, rows=len(rows), steps=len(batches))
    longest = {kind: max(rows, key=lambda r, i=i: r["lengths"][i])[side]
               for i, (side, kind) in enumerate(sides.items())}

    resume, history = trainer_common.open_checkpoints(checkpoints, [vars(cfg), data_hash, method])
    at_once, predicted = plan(model, cfg, longest, per_process, log)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints), per_device_train_batch_size=per_process, max_steps=cfg.max_steps,
        learning_rate=cfg.learning_rate, lr_scheduler_type=cfg.schedule, warmup_steps=cfg.warmup_steps, max_grad_norm=cfg.max_grad_norm,
        weight_decay=cfg.weight_decay, optim=cfg.optimizer, **models.trainer_dtype(models.arithmetic(cfg.precision, cfg.compute)),
        use_cpu=models.device().type == "cpu", seed=cfg.seed,
        eval_strategy="steps", eval_steps=cfg.eval_every, eval_on_start=not resume, save_steps=cfg.eval_every, save_total_limit=2,
        prompts={side: model.prompts[kind] for side, kind in sides.items()},
        ddp_find_unused_parameters=False,  # all that is trained has a gradient at every step
        logging_steps=cfg.log_every, logging_nan_inf_filter=False, dataloader_num_workers=cfg.workers,
        disable_tqdm=not sys.stderr.isatty(), report_to="none")
    args._n_gpu = min(args.n_gpu, 1)  # else one process on a host of several GPUs is spread over them by DataParallel
    options = dict(scale=cfg.scale, similarity_fct=cos_sim_fp32, **SYMMETRIC,
                   gather_across_devices=trainer_common.PROCESSES > 1)
    if at_once == per_process:
        loss = MultipleNegativesRankingLoss(model, **options)
    else:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=at_once, **options)
    trainer = Trainer(
        model=model, loss=loss,
        train_dataset=Dataset.from_dict({side: [r[side] for r in rows] for side in ("anchor", "positive")}), args=args,
        batches=batches, dev=dev, cfg=cfg, best=checkpoints / "best.safetensors",
        callbacks=[trainer_common.Log(log, ("loss", "eval_mrr@10", "learning_rate", "grad_norm"), history)])
    trainer.remove_callback(PrinterCallback)
    cast_inputs(model, False)
    started, resident = time.time(), results.peak_memory()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.time() - started
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else its forward stays under autocast for good
    cast_inputs(model, True)
    trainer.accelerator.wait_for_everyone()  # the first process wrote what all read now
    set_trained_state(model, load_file(trainer.best))
    looks = results.read_rows(history)
    scores = [h["eval_mrr@10"] for h in looks if "eval_mrr@10" in h]
    kept = max((h for h in looks if "eval_mrr@10" in h and h["step"]), key=lambda h: (h["eval_mrr@10"], -h["step"]))
    lengths = [[rows[i]["lengths"] for i in batch] for batch in dealt(batches)]  # each padded by its own process
    tokens = sum(sum(pair) for batch in lengths for pair in batch)
    padded = sum(len(batch) * sum(map(max, zip(*batch))) for batch in lengths)
    facts = {"trainable_parameters": trainable, "trained_pairs": sum(map(len, batches)), "epochs": sum(map(len, batches)) / len(rows),
             "trained_tokens": tokens, "padding_share": 1 - tokens / padded, "steps": len(batches), "processes": trainer_common.PROCESSES,
             "kept_step": kept["step"], "pairs_seen_by_then": kept["step"] * cfg.batch_size, "dev_mrr_before": scores[0],
             "dev_mrr_kept": kept["eval_mrr@10"], "dev_mrr_last": scores[-1], "rows_per_pass": at_once,
             **{f"predicted_{name}_bytes": value for name, value in predicted.items()},
             "peak_bytes_before_training": resident, "measured_peak_bytes": results.peak_memory(),
             "training_seconds": None if resume else seconds,  # the seconds before a resumption are not known
             "tokens_per_second": None if resume else tokens / seconds}
    return model.eval(), facts, looks
