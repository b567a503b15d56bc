"""Question: what do new rows, whole matrices and LoRA each add, and is it more than without new tokens?

Two models are trained on the same texts in the same order, the arms of the experiment: "new" has the terms as
single tokens, "control" keeps the old tokenizer. Each goes through four stages, every one with a fresh
optimizer: (a) rows of tokens only, (b) input embedding and output head, (c1) these and LoRA on the attention,
(c2) LoRA on the MLP as well. A stage reads a checkpoint that plain transformers can open, and writes another.

Reads   terms.json, tokenizer/ and {train,dev}.jsonl of 01, under runs/<run>/task3_tokenizer/
Writes  results/<run>/task3_tokenizer/03_train.json; checkpoints under runs/<run>/task3_tokenizer/, in
        {new,control}/{init,a,b,c1,c2}/
Needs   about 6 min and 5.5 GB on 2 cores, 3 GB of disk. Interrupted, the same command goes on after the last
        finished stage.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

from pipeline import results, runner

if __name__ == "__main__":
    runner.check_arguments(__file__, __doc__)  # before the next imports, which take seconds

import gc
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from common import models, training
from common.stats import facts
from task3_tokenizer import distil, embeddings, task, windows


@dataclass(frozen=True)
class Config(task.Config):
    # -- the new rows --
    # First values: the mean of the old pieces' rows, as the assignment says. Of the others of
    # embeddings.INITS, "distilled" is 0.01 bits per byte better after (a), no other is (make ablations).
    init: str = "mean of pieces"
    # If init is "distilled", how often it reads the windows of (a), which the other inits do not see. Once is
    # 30 steps with 20 terms, and took dev bits per byte before training from 1.767, the mean's, to 1.746. Few
    # terms need more: four make 6 steps.
    distil_passes: int = 1
    # One matrix for input and output, as SmolLM2 has it? Two by default: the input row encodes meaning, the
    # output row predicts occurrence.
    tied: bool = False

    # -- texts, all seen once: 51 for each token, as the assignment's 50-100 --
    # (a) gets nearly half of them: it is the cheapest stage, and the only one that teaches without touching
    # old weights.
    texts_a: int = 24
    # Enough to see what a stage adds, few enough that every old row of the matrices moves little.
    texts_b: int = 9
    # As many as in (b), so that what the stages add can be compared.
    texts_c1: int = 9
    # As many as in (b), for the same reason.
    texts_c2: int = 9

    # -- the optimizer; dev figures of one comment share texts, which differ from those of other comments --
    # Rows in (a): 38 steps of an earlier run took dev bits per byte from 1.731 to 1.589 at 1e-2 and to 1.596
    # at 2e-2; with four more terms and 45 steps, from 1.796 to 1.723 at 1e-3, 1.682 at 3e-3 and 1.661 at
    # 1e-2. Usual rates are for matrices of which every row is trained all the time.
    lr_rows: float = 1e-2
    # The same rows in (b) and later, still a parameter of their own: dev after (c2) was 1.168 (control
    # 1.159), against 1.172 (1.161) when they were trained at the rate of the matrices.
    lr_rows_later: float = 3e-3
    # Matrices in (b) and later, 28 million old weights: dev 1.564 at 1e-4, 1.516 at 3e-4, 1.435 at 1e-3. But
    # general English got better at 3e-4 (1.067 to 1.059 bits per byte) and worse at 1e-3 (1.069).
    lr_matrices: float = 3e-4
    # LoRA weights have only 12 steps, 35 on a GPU. Dev after (c1) was 1.370 at 1e-3 and lower at 2e-3, one
    # run each, but 2e-3 is near the edge: with four Russian terms in batches of four (c2) diverged there, its
    # loss rising from 2.9 to 4.2. Six seeds spread new minus control from -0.022 to 0.010 at 1e-3 and from
    # -0.011 to 0.007 at 5e-4, where both arms end 0.04 higher.
    lr_lora: float = 1e-3
    # No decay: it pulls a row towards 0, which is no better place for a word.
    weight_decay: float = 0.0
    # Windows of about 45 tokens in a step, but never more than there are terms: a step is then 2,800 bytes of
    # text and has most terms. The rates were tuned at 16, so no profile changes it. Where there are
    # fewer terms than batch_size, the rates fall with the square root of the batch, which is Adam's rule
    # (Malladi et al. 2022, arXiv:2205.10782).
    batch_size: int = 16
    # Share of a stage's steps in which the rate rises, because Adam's statistics are unreliable in its first
    # steps.
    warmup: float = 0.1
    # The rate falls to zero within each stage, so that the next starts from weights that have settled.
    schedule: str = "cosine"
    # The library's default: it limits the effect of outliers.
    max_grad_norm: float = 1.0

    # -- the adapter of (c1) and (c2), merged after each --
    # Rank, a cap on capacity; as in task 1, untuned here.
    lora_r: int = 16
    # The update is scaled by alpha / r = 2, the common default; lr_lora is tuned instead.
    lora_alpha: int = 32
    # No text is seen twice, so there is nothing to overfit.
    lora_dropout: float = 0.0
    # Steps between log lines.
    log_every: int = 5


PROFILES = {
    "smoke": dict(texts_a=1, texts_b=1, texts_c1=1, texts_c2=1, batch_size=8, log_every=1),
    "cpu": dict(),
    "gpu": dict(
        # The assignment's upper bound and more; of fewer than 250 windows each stage gets the same share.
        texts_a=100,
        texts_b=50,
        texts_c1=50,
        texts_c2=50,
        log_every=20,
    ),
}


# ----------------------------------------------------------------------------------------- stages and arms

class Stage(NamedTuple):
    """What a stage trains: the arm's rows; the whole matrices, if they have a rate; and LoRA on `layers`,
    "attention" or "all-linear"."""
    texts: int  # of each term
    lr_rows: float
    lr_matrices: float | None = None
    lr_lora: float | None = None
    layers: str | None = None


def stages(cfg, batch_size: int) -> dict[str, Stage]:
    """{stage: what it trains}, in order; the comment at Config.batch_size explains the scale of the rates."""
    scale = math.sqrt(batch_size / cfg.batch_size)
    rows, matrices, lora = scale * cfg.lr_rows_later, scale * cfg.lr_matrices, scale * cfg.lr_lora
    return {
        "a": Stage(cfg.texts_a, scale * cfg.lr_rows),
        "b": Stage(cfg.texts_b, rows, matrices),
        "c1": Stage(cfg.texts_c1, rows, matrices, lora, "attention"),
        "c2": Stage(cfg.texts_c2, rows, matrices, lora, "all-linear"),
    }


class Arm(NamedTuple):
    """One of the two models. A token's id is the number of its row in both matrices."""
    name: str
    tokenizer: object
    pieces_of: dict[int, list[int]]  # {id whose rows get first values: the ids they are made from}
    ids: list[int]  # whose rows learn in every stage


def arms(lexicon: task.Lexicon) -> list[Arm]:
    """New tokens, and the control, which trains the rows of the terms' old pieces instead of new rows."""
    pieces = {i for term in lexicon.ids for i in task.ids_of(lexicon.old, f" {term}")}
    return [Arm("new", lexicon.new, lexicon.pieces_of, sorted(lexicon.pieces_of)),
            Arm("control", lexicon.old, {}, sorted(pieces))]


# ----------------------------------------------------------------------------------------------- one stage

def save_untrained(cfg, arm: Arm, target: Path, dev: list[dict], texts: list[dict] = ()) -> dict:
    """The model before training: untied unless cfg.tied, resized to the tokenizer, new rows initialised, with
    the windows `texts` if they are distilled. Saved in `target`; returns its stats."""
    model = models.load_decoder(cfg.model, models.compute_name(cfg.compute))
    tied = model.config.tie_word_embeddings
    if cfg.tied and not tied:
        raise SystemExit(f"tied=true: {cfg.model} has an output head of its own; leave it untied")
    if tied and not cfg.tied:
        embeddings.untie(model)
    now = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(max(now, len(arm.tokenizer)), mean_resizing=False)
    if arm.pieces_of:
        embeddings.initialise(model, arm.pieces_of, cfg.init, cfg.seed)
        if cfg.init == "distilled":
            distil.fit(model, arm.ids, texts, models.load_tokenizer(cfg.model), arm.tokenizer,
                       models.compute_name(cfg.compute), cfg.distil_passes)
    return save(cfg, arm, target, model, dev)


def train_stage(cfg, arm: Arm, stage: Stage, source: Path, target: Path, texts: list[dict], batch_size: int,
                dev: list[dict], log) -> dict:
    """Train the checkpoint `source` on the windows `texts`, in their order and once, and save it as `target`:
    LoRA is merged, and rows and matrices are rounded to the model's own format. Returns the stats."""
    set_seed(cfg.seed)
    model = models.load_decoder(str(source), models.compute_name(cfg.compute))
    plain = embeddings.both(model)
    rows, matrices = embeddings.train_rows(model, arm.ids, whole=stage.lr_matrices is not None)
    learn = [{"params": rows, "lr": stage.lr_rows}]
    if matrices:
        learn.append({"params": matrices, "lr": stage.lr_matrices})
    if stage.layers:
        attention = [name for name in models.linear_layers(model) if "attn" in name or "attention" in name]
        model = get_peft_model(model, LoraConfig(  # bias: none is trained; SmolLM2 has none
            task_type="CAUSAL_LM", r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout,
            bias="none", target_modules=attention if stage.layers == "attention" else stage.layers))
        for parameter in rows + matrices:  # PEFT freezes everything that it did not make
            parameter.requires_grad_(True)
        lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        learn.append({"params": lora, "lr": stage.lr_lora})
    stats = fit(cfg, model, arm.tokenizer, learn, texts, batch_size,
                [training.Log(log, ("loss", "grad_norm"), stage=f"{arm.name}/{target.name}"),
                 *training.tensorboard(target.parent / "tensorboard" / target.name)])

    # back to a plain model, with what was learnt written into its own two matrices
    model = model.merge_and_unload() if stage.layers else model
    model.set_input_embeddings(plain[0])
    model.set_output_embeddings(plain[1])
    model.config.use_cache = True  # the Trainer turned it off, which would make generation slow
    before = [layer.weight.detach().to(torch.float32, copy=True) for layer in plain]
    embeddings.write_rows(model, arm.ids, rows, matrices)
    for side, old, layer in zip(("input", "output"), before, plain):
        moved = (layer.weight.detach().float() - old).abs()
        moved[arm.ids] = 0
        assert matrices or not moved.any(), f"{target}: rows moved that this stage does not train"
        stats[f"{side}_largest_change_of_other_rows"] = moved.max().item()
    return stats | save(cfg, arm, target, model, dev)


class WindowTrainer(Trainer):
    """The mean cross-entropy of a batch's real tokens after the first `n_start`, computed in `precision`.

    The library's own loss would need logits of padding too, 1 GB a step in fp32.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        real = inputs["attention_mask"][:, self.n_start:].bool()
        with models.autocast(self.precision):
            states = models.causal_of(model).get_decoder()(**inputs, use_cache=False).last_hidden_state
            logits = models.logits_of(model, states[:, self.n_start - 1:-1][real])
        return torch.nn.functional.cross_entropy(logits, inputs["input_ids"][:, self.n_start:][real])


def fit(cfg, model, tokenizer, learn: list[dict], texts: list[dict], batch_size: int, callbacks) -> dict:
    """Train the parameter groups `learn` {"params", "lr"} of `model` on windows; returns stats."""
    start = task.start_ids(tokenizer)
    lines = [[*start, *task.ids_of(tokenizer, row["text"])] for row in texts]
    steps, precision = math.ceil(len(lines) / batch_size), models.compute_name(cfg.compute)
    args = TrainingArguments(
        output_dir=str(results.ROOT / "runs"), save_strategy="no", remove_unused_columns=False, seed=cfg.seed,
        per_device_train_batch_size=batch_size, train_sampling_strategy="sequential", max_steps=steps,
        lr_scheduler_type=cfg.schedule, warmup_steps=max(1, round(cfg.warmup * steps)),
        max_grad_norm=cfg.max_grad_norm, logging_steps=cfg.log_every, **training.options(precision))
    # AdamW with a rate for each group; its state, two fp32 matrices at most, needs no 8 bits
    trainer = WindowTrainer(
        model=model, args=training.one_process(args), train_dataset=lines,
        data_collator=lambda batch: task.padded(batch, tokenizer.pad_token_id),
        optimizers=(torch.optim.AdamW(learn, weight_decay=cfg.weight_decay), None),
        callbacks=callbacks)
    trainer.n_start, trainer.precision = len(start), precision
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # undoes the autocast around its forward
    stats = {"steps": steps, "texts": len(texts), "tokens": sum(map(len, lines)),
             "seconds": time.monotonic() - started,
             "trainable_parameters": sum(p.numel() for group in learn for p in group["params"]),
             "losses": [{"step": reading["step"], "value": reading["loss"]}
                        for reading in trainer.state.log_history if "loss" in reading]}
    del trainer
    gc.collect()  # trainer and model hold each other, and with them the optimizer's state
    return stats


def save(cfg, arm: Arm, target: Path, model, dev: list[dict]) -> dict:
    """Write a checkpoint that AutoModelForCausalLM and AutoTokenizer open; returns its bits per byte of dev
    windows."""
    items = task.score(model.eval(), arm.tokenizer, dev, cfg.eval_batch_size)
    bits = sum(i["nats"] for i in items) / sum(i["bytes"] for i in items) / math.log(2)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    models.save_companions(model, arm.tokenizer, target)
    return {"dev_bits_per_byte": bits}


# ---------------------------------------------------------------------------------------------- all stages

def train(cfg, arm: Arm, folder: Path, texts: list[dict], dev: list[dict], made_from: str,
          log) -> Iterator[tuple[str, dict]]:
    """Train one arm on windows, checkpoint after checkpoint under `folder`; yields (stage, stats), "init"
    first. A finished stage has stage.json, and is not repeated for the same knobs, code and `made_from` (the
    hash of 01's result)."""
    batch_size = min(cfg.batch_size, len(windows.by_term(texts)))
    plan = stages(cfg, batch_size)
    parts = windows.split_into_stages(texts, {name: stage.texts for name, stage in plan.items()})
    source, seed = folder / "init", cfg.seed
    for name, part in parts.items():
        parts[name] = windows.interleave_terms(part, seed, batch_size)
        seed += max(map(len, windows.by_term(part)))  # no stage repeats the order of another
    jobs = {"init": partial(save_untrained, cfg, arm, source, dev, parts["a"])}
    for name, stage in plan.items():
        target = folder / name
        jobs[name] = partial(train_stage, cfg, arm, stage, source, target, parts[name], batch_size, dev, log)
        source = target
    for name, job in jobs.items():
        yield name, results.cached(folder / name / "stage.json", [vars(cfg), made_from, arm.name, name], job)


def main(run):
    data, table, dev_bits = results.result_hash(run.load("01_data")), [], {}
    texts, dev = map(run.rows, ("train", "dev"))
    for arm in arms(task.lexicon(run)):
        for stage, stats in train(run.cfg, arm, run.folder / arm.name, texts, dev, data, run.log):
            about = {"name": arm.name, "stage": stage}
            # losses are a table of their own; "identity" is what results.cached compares
            losses, _ = stats.pop("losses", []), stats.pop("identity")
            table += [{"table": "curve", **about, "metric": "loss", **loss} for loss in losses]
            table += facts("training", arm.name, stats, stage=stage)
            dev_bits[f"dev_bits_per_byte_{arm.name}"] = stats["dev_bits_per_byte"]
            run.log(arm=arm.name, stage=stage, dev_bits_per_byte=stats["dev_bits_per_byte"])
    tokens, seconds = (sum(row["value"] for row in table if row["metric"] == metric)
                       for metric in ("tokens", "seconds"))
    run.save(table, tokens_per_second=tokens / seconds,
             artifacts=[f"{arm}/{stage}" for arm in ("new", "control") for stage in ("init", *task.STAGES)])
    run.log(**dev_bits)


if __name__ == "__main__":
    runner.start(main, Config, task.PROFILES, PROFILES)
