"""What 03_train.py needs around the library's Trainer: the order of texts, one stage, the plain checkpoint it leaves, resuming.

A stage reads a checkpoint that plain transformers can open, trains, and writes another. Nothing is handed on in memory: what the next
stage starts from, what 04 scores and what a user loads is the same file.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from common import models, results
from common.trainer import Log
from task3_tokenizer import embeddings, task


def shares(cfg, windows: int) -> dict[str, int]:
    """{stage: texts} of a term with so many windows: the knobs, or all four cut alike if there are fewer. SystemExit if a stage got none."""
    asked = {"a": cfg.texts_a, "b": cfg.texts_b, "c1": cfg.texts_c1, "c2": cfg.texts_c2}
    if min(asked.values()) < 1 or windows < len(asked):
        raise SystemExit(f"texts per term and stage {asked}, windows of a term {windows}: every stage needs at least one")
    part = min(1.0, windows / sum(asked.values()))
    found = {stage: max(1, int(part * texts)) for stage, texts in asked.items()}
    while sum(found.values()) > windows:  # where a stage got one instead of less
        found[max(found, key=found.get)] -= 1
    return found


def grouped(rows: list[dict]) -> list[list[dict]]:
    """The windows of each term."""
    by_term: dict[str, list[dict]] = {}
    for row in rows:
        by_term.setdefault(row["term"], []).append(row)
    return list(by_term.values())


def deal(cfg, rows: list[dict]) -> dict[str, list[dict]]:
    """{stage: windows}: `shares` of every term's windows, none of them twice."""
    dealt: dict[str, list[dict]] = {stage: [] for stage in task.STAGES}
    for own in grouped(rows):
        start = 0
        for stage, texts in shares(cfg, len(own)).items():
            dealt[stage] += own[start:start + texts]
            start += texts
    return dealt


def in_turn(rows: list[dict], seed: int, batch_size: int, each: int | None = None) -> list[dict]:
    """All windows, or the first `each` of every term: rounds of one of each term, in random order. Within spans of 8 batches similar
    lengths come together (7 % of tokens are then padding, not 25 %), the full batches of a span shuffled again."""
    rng, turns, out, by_term = random.Random(seed), [], [], grouped(rows)
    for k in range(each or max(map(len, by_term))):
        now = [own[k] for own in by_term if k < len(own)]
        turns += rng.sample(now, len(now))
    for start in range(0, len(turns), 8 * batch_size):
        span = sorted(turns[start:start + 8 * batch_size], key=lambda row: len(row["text"]))
        batches = [span[i:i + batch_size] for i in range(0, len(span), batch_size)]
        full = [batch for batch in batches if len(batch) == batch_size]
        out += [row for batch in rng.sample(full, len(full)) + batches[len(full):] for row in batch]
    return out


def rates(cfg, stage: str, batch_size: int) -> tuple[float, float, float]:
    """Learning rates of rows, matrices and LoRA. They were tuned at cfg.batch_size windows a step, and fall with the square root of what
    fewer terms leave of it: Adam's rule (Malladi et al. 2022, arXiv:2205.10782)."""
    part = math.sqrt(batch_size / cfg.batch_size)
    return part * (cfg.lr_rows if stage == "a" else cfg.lr_rows_later), part * cfg.lr_matrices, part * cfg.lr_lora


def lora_layers(cfg) -> dict[str, list[str]]:
    """{"attention": names, "mlp": names} of the layers that get LoRA, as PEFT takes them: endings of names.

    "auto" takes all linear layers of the decoder: those inside a module whose name has "attn" or
    "attention" in it for the attention, the others for the MLP. Two parts of a name ("self_attn.q_proj")
    keep the lists apart where both have a layer of one name, as GPT-2 has c_proj. SystemExit for a name
    that is not there.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models.resolve(cfg.model)))
    full = list(models.linear_layers(model))
    there: dict[str, list[str]] = {"attention": [], "mlp": []}
    for name in full:
        kind = "attention" if "attn" in name or "attention" in name else "mlp"
        there[kind].append(".".join(name.split(".")[-2:]))
    there = {kind: list(dict.fromkeys(names)) for kind, names in there.items()}
    found = {}
    for kind, names in there.items():
        asked = getattr(cfg, kind)
        found[kind] = names if asked == "auto" else asked.split()
        missing = [name for name in found[kind] if not any(f".{long}".endswith(f".{name}") for long in full)]
        if missing or not found[kind]:
            raise SystemExit(f"MODEL={cfg.model}: no linear layer for {kind}={' '.join(missing) or asked}; "
                             f"it has {' '.join(there['attention'] + there['mlp']) or 'none'}")
    return found


def collate(examples: list[list[int]], pad_token_id: int, first: int = 1) -> dict:
    """Right-padded batch of id lists: input_ids, attention_mask, labels, each (rows, columns).

    Labels are -100 for padding, which is found by length, and for the `first` tokens of a row, before its
    text.
    """
    width = max(map(len, examples))
    return {"input_ids": torch.tensor([e + [pad_token_id] * (width - len(e)) for e in examples]),
            "attention_mask": torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in examples]),
            "labels": torch.tensor([[-100] * first + e[first:] + [-100] * (width - len(e))
                                    for e in examples])}


class WindowTrainer(Trainer):
    """Trainer with logits of real tokens only; the library's has them of padding too, 1 GB a step in fp32.

    `precision`, the format of the arithmetic, is set by `fit`.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        real = labels != -100
        with models.autocast(self.precision):
            found = models.causal_of(model).get_decoder()(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            logits = models.logits_of(model, found.last_hidden_state[:, :-1][real])
        return torch.nn.functional.cross_entropy(logits, labels[real])


def fit(cfg, model, tokenizer, groups: list[tuple[list, float]], rows: list[dict], batch_size: int, name: str, log,
        trainer_class: type[Trainer] = WindowTrainer) -> dict:
    """Train the parameters of `groups` [(parameters, learning rate)] on windows `rows` in their order, once; returns facts and losses."""
    start = task.start_ids(tokenizer)
    examples = [[*start, *task.ids_of(tokenizer, row["text"])] for row in rows]
    steps = math.ceil(len(examples) / batch_size)
    precision = models.compute_name(cfg.compute)
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": rate} for parameters, rate in groups], weight_decay=cfg.weight_decay)
    args = TrainingArguments(
        output_dir=str(results.ROOT / "runs"), per_device_train_batch_size=batch_size, train_sampling_strategy="sequential",
        max_steps=steps, lr_scheduler_type=cfg.schedule, warmup_steps=max(1, round(cfg.warmup * steps)), max_grad_norm=cfg.max_grad_norm,
        **models.trainer_dtype(precision), use_cpu=models.device().type == "cpu", seed=cfg.seed,
        save_strategy="no", logging_steps=cfg.log_every, logging_nan_inf_filter=False,
        disable_tqdm=not sys.stderr.isatty(), remove_unused_columns=False, label_names=["labels"], report_to="none")
    args._n_gpu = min(1, args.n_gpu)  # on a host with several the library would wrap the model, and train on batches as many times as large
    trainer = trainer_class(
        model=model, train_dataset=examples, args=args, optimizers=(optimizer, None), callbacks=[Log(log, ("loss", "grad_norm"), stage=name)],
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id, len(start)))
    trainer.precision = precision
    trainer.remove_callback(PrinterCallback)
    started = time.time()
    trainer.train()
    seconds, tokens, history = time.time() - started, sum(map(len, examples)), trainer.state.log_history
    del trainer
    gc.collect()  # trainer and model hold each other: without this the optimizer's state stays until some later collection
    return {"steps": steps, "texts": len(rows), "tokens": tokens, "seconds": seconds,
            "trainable_parameters": sum(p.numel() for parameters, _ in groups for p in parameters),
            "losses": [{"step": h["step"], "value": h["loss"]} for h in history if "loss" in h]}


def identity(knobs: dict, data: dict, *name) -> str:
    """What a checkpoint was made from: knobs, data, code and its place in the order."""
    return hashlib.sha256(json.dumps([knobs, results.result_hash(data), results.imported_modules(), *name]).encode()).hexdigest()


def stored(folder: Path, mark: str) -> dict | None:
    """Facts of a finished stage if it was made from the same things; what was made from others, or cut short, is removed."""
    facts = folder / "stage.json"  # the last thing written
    if facts.exists() and (found := json.loads(facts.read_text()))["identity"] == mark:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    return None


def save(folder: Path, model, tokenizer, facts: dict) -> None:
    """A checkpoint that AutoModelForCausalLM and AutoTokenizer open, and last its facts."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results.write_atomic(folder / "stage.json", json.dumps(facts))


def dev_score(cfg, model, tokenizer, dev: list[dict]) -> float:
    """Bits per byte of the dev windows."""
    items = task.score(model.eval(), tokenizer, dev, cfg.eval_batch_size)
    return sum(i["nats"] for i in items) / sum(i["bytes"] for i in items) / math.log(2)


def begin(cfg, folder: Path, tokenizer, splits: dict[int, list[int]], dev: list[dict], mark: str) -> dict:
    """The model before any training: untied unless the knob says tied, resized to the tokenizer, new rows initialised."""
    model = models.load_decoder(cfg.model, models.compute_name(cfg.compute))
    if not cfg.tied and model.config.tie_word_embeddings:
        embeddings.untie(model)
    if cfg.tied and not model.config.tie_word_embeddings:
        raise SystemExit(f"tied=true: {cfg.model} has an output head of its own; leave it untied")
    size = max(len(tokenizer), model.get_input_embeddings().weight.shape[0])  # a padded matrix is never made smaller
    model.resize_token_embeddings(size, mean_resizing=False)
    if splits:
        if cfg.tied and cfg.init in ("last and first piece", "weighted pieces"):
            raise SystemExit(f"init={cfg.init!r} gives input and output different rows, and tied=true has only one of them")
        embeddings.initialise(model, splits, cfg.init, cfg.seed)
    facts = {"identity": mark, "dev_bits_per_byte": dev_score(cfg, model, tokenizer, dev)}
    save(folder, model, tokenizer, facts)
    return facts


def train_stage(cfg, source: Path, target: Path, tokenizer, ids: list[int], whole: bool, modules: list[str], rates: tuple[float, ...],
                rows: list[dict], batch_size: int, dev: list[dict], mark: str, log) -> dict:
    """One stage from checkpoint to checkpoint: the rows `ids` of both matrices, with `whole` these matrices, and LoRA on `modules`, if any.

    `rates`: learning rates of rows, matrices and LoRA. The adapter is merged into the weights, rows are
    rounded to their format, and dev bits per byte are those of the saved model. Returns the facts.
    SystemExit, and nothing saved, if rows moved that nothing trained.
    """
    transformers.set_seed(cfg.seed)
    precision = models.compute_name(cfg.compute)
    model = models.load_decoder(str(source), precision)
    model.config.use_cache = False
    own, matrices = embeddings.train_rows(model, ids, whole)
    groups = [(own, rates[0]), *([(matrices, rates[1])] if whole else [])]
    if modules:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=cfg.lora_r, lora_alpha=cfg.lora_alpha, bias="none",
                                                 lora_dropout=cfg.lora_dropout, target_modules=modules))
        for parameter in own + matrices:  # PEFT freezes all it did not make
            parameter.requires_grad_(True)
        groups.append(([p for n, p in model.named_parameters() if "lora_" in n], rates[2]))
    facts = fit(cfg, model, tokenizer, groups, rows, batch_size, f"{target.parent.name}/{target.name}", log)

    merged = models.load_decoder(str(source), precision)
    before = [layer.weight.detach().clone() for layer in (merged.get_input_embeddings(), merged.get_output_embeddings())]
    if modules:
        adapter = target.with_name(f"{target.name}-adapter")
        model.save_pretrained(adapter, save_embedding_layers=False)
        merged = PeftModel.from_pretrained(merged, str(adapter)).merge_and_unload()
        shutil.rmtree(adapter)
    embeddings.write_rows(merged, ids, own, matrices)
    after = [merged.get_input_embeddings().weight, merged.get_output_embeddings().weight]
    facts |= {"identity": mark, "dev_bits_per_byte": dev_score(cfg, merged, tokenizer, dev), **embeddings.changes(before, after, ids)}
    if not (whole or (facts["input_rows_identical"] and facts["output_rows_identical"])):
        raise SystemExit(f"{results.shown(target)}: this stage moved rows it must not touch")
    save(target, merged, tokenizer, facts)
    return facts


def stages(cfg, folder: Path, tokenizer, splits: dict[int, list[int]], ids: list[int], rows: list[dict], dev: list[dict], mark,
           log) -> Iterator[tuple[str, dict]]:
    """Train one arm, checkpoint after checkpoint under `folder`; yields (stage, facts), "init" first. `ids` are the rows that learn apart,
    `splits` those to initialise. A stage stored with the identity `mark(stage)` is not trained again."""
    layers = lora_layers(cfg)
    modules = {"c1": layers["attention"], "c2": layers["attention"] + layers["mlp"]}
    batch_size, rounds = min(cfg.batch_size, len(grouped(rows))), 0
    source, now = folder / "init", mark("init")
    yield "init", stored(source, now) or begin(cfg, source, tokenizer, splits, dev, now)
    for stage, part in deal(cfg, rows).items():
        target, now, shown = folder / stage, mark(stage), in_turn(part, cfg.seed + rounds, batch_size)
        yield stage, stored(target, now) or train_stage(cfg, source, target, tokenizer, ids, stage != "a", modules.get(stage, []),
                                                        rates(cfg, stage, batch_size), shown, batch_size, dev, now, log)
        source, rounds = target, rounds + max(map(len, grouped(part)))
