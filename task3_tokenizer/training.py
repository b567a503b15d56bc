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
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from common import models, results
from task3_tokenizer import embeddings, task


def in_turn(rows: list[dict], each: int, seed: int, batch_size: int, skip: int = 0) -> list[dict]:
    """`each` windows of every term, those before `skip` left out: rounds of one of each term, in random order. Within spans of 8 batches
    similar lengths come together (7 % of tokens are then padding, not 25 %), the full batches of a span shuffled again."""
    by_term: dict[str, list[dict]] = {}
    for row in rows:
        by_term.setdefault(row["term"], []).append(row)
    rng, turns, out = random.Random(seed + skip), [], []
    for k in range(skip, skip + each):
        now = [own[k] for own in by_term.values() if k < len(own)]
        turns += rng.sample(now, len(now))
    for start in range(0, len(turns), 8 * batch_size):
        span = sorted(turns[start:start + 8 * batch_size], key=lambda row: len(row["text"]))
        batches = [span[i:i + batch_size] for i in range(0, len(span), batch_size)]
        full = [batch for batch in batches if len(batch) == batch_size]
        out += [row for batch in rng.sample(full, len(full)) + batches[len(full):] for row in batch]
    return out


def shares(cfg, rows: list[dict]) -> dict[str, int]:
    """{stage: texts per term}: the knobs, or all four cut alike if no term has as many windows. SystemExit if a stage would get none."""
    asked = {"a": cfg.texts_a, "b": cfg.texts_b, "c1": cfg.texts_c1, "c2": cfg.texts_c2}
    most = max(Counter(row["term"] for row in rows).values())
    if min(asked.values()) < 1 or most < len(asked):
        raise SystemExit(f"texts per term and stage {asked}, windows of a term {most}: every stage needs at least one")
    part = min(1.0, most / sum(asked.values()))
    return {stage: max(1, int(part * texts)) for stage, texts in asked.items()}


def check_names(name: str, modules: list[str]) -> None:
    """SystemExit before anything is trained if LoRA would not find its layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models.resolve(name)))
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"})
    if missing := [m for m in modules if m not in linear]:
        raise SystemExit(f"MODEL={name}: no linear layer named {missing[0]!r} for attention=.. or mlp=..; it has {', '.join(linear) or 'none'}")


def collate(examples: list[list[int]], pad_token_id: int) -> dict:
    """Right-padded batch of id lists: input_ids, attention_mask, labels, each (rows, columns); padding is masked by length."""
    width = max(map(len, examples))
    return {"input_ids": torch.tensor([e + [pad_token_id] * (width - len(e)) for e in examples]),
            "attention_mask": torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in examples]),
            "labels": torch.tensor([e + [-100] * (width - len(e)) for e in examples])}


class WindowTrainer(Trainer):
    """Trainer whose loss puts the head on real tokens only; the library's computes and upcasts logits (1 GB a step) for padding as well."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper hides the decoder
        mask = inputs["attention_mask"]
        real = mask[:, 1:].bool()
        with torch.autocast(mask.device.type, torch.bfloat16):
            hidden = causal.get_decoder()(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state
            logits = causal.get_output_embeddings()(hidden[:, :-1][real])
        return torch.nn.functional.cross_entropy(logits.float(), inputs["labels"][:, 1:][real])


class Progress(TrainerCallback):
    """A line per logging step, through run.log."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.log(stage=self.name, step=f"{state.global_step}/{state.max_steps}", loss=logs["loss"], grad_norm=logs["grad_norm"])


def fit(cfg, model, tokenizer, groups: list[tuple[list, float]], rows: list[dict], batch_size: int, name: str, log) -> dict:
    """Train the parameters of `groups` [(parameters, learning rate)] on windows `rows` in their order, once; returns facts and losses."""
    examples = [[tokenizer.eos_token_id, *task.ids_of(tokenizer, row["text"])] for row in rows]
    steps = math.ceil(len(examples) / batch_size)
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": rate} for parameters, rate in groups], weight_decay=cfg.weight_decay)
    trainer = WindowTrainer(
        model=model, train_dataset=examples, optimizers=(optimizer, None), callbacks=[Progress(log, name)],
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        args=TrainingArguments(
            output_dir=str(results.ROOT / "runs"), per_device_train_batch_size=batch_size, train_sampling_strategy="sequential",
            max_steps=steps, lr_scheduler_type=cfg.schedule, warmup_steps=max(1, round(cfg.warmup * steps)), max_grad_norm=cfg.max_grad_norm,
            bf16=True, use_cpu=models.device().type == "cpu", seed=cfg.seed, save_strategy="no", logging_steps=cfg.log_every,
            disable_tqdm=not sys.stderr.isatty(), remove_unused_columns=False, label_names=["labels"], report_to="none"))
    trainer.remove_callback(PrinterCallback)
    started = time.time()
    trainer.train()
    seconds, tokens, history = time.time() - started, sum(map(len, examples)), trainer.state.log_history
    del trainer
    gc.collect()  # trainer and model hold each other: without this the optimizer's state stays until some later collection
    return {"steps": steps, "texts": len(rows), "tokens": tokens, "seconds": seconds,
            "trainable_parameters": sum(p.numel() for parameters, _ in groups for p in parameters),
            "losses": [{"step": h["step"], "value": h["loss"]} for h in history if "loss" in h]}


def identity(run, data: dict, *name) -> str:
    """What a checkpoint was made from: knobs, data, code and its place in the order."""
    return hashlib.sha256(json.dumps([vars(run.cfg), results.result_hash(data), results.imported_modules(), *name]).encode()).hexdigest()


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
    model = models.load_decoder(cfg.model, "bf16")
    if not cfg.tied and model.config.tie_word_embeddings:
        embeddings.untie(model)
    if cfg.tied and not model.config.tie_word_embeddings:
        raise SystemExit(f"tied=true: {cfg.model} has an output head of its own; leave it untied")
    size = max(len(tokenizer), model.get_input_embeddings().weight.shape[0])  # a padded matrix is never made smaller
    model.resize_token_embeddings(size, mean_resizing=False)
    if splits:
        if cfg.tied and cfg.init in ("last and first piece", "weighted pieces"):
            raise SystemExit(f"init={cfg.init!r} gives input and output different rows, and tied=true has only one of them")
        sides = zip(("input", "output"), (model.get_input_embeddings().weight, model.get_output_embeddings().weight))
        rows = [embeddings.initial(matrix, [splits[i] for i in sorted(splits)], cfg.init, side, cfg.seed) for side, matrix in sides]
        embeddings.write_rows(model, list(splits), rows)
    facts = {"identity": mark, "dev_bits_per_byte": dev_score(cfg, model, tokenizer, dev)}
    save(folder, model, tokenizer, facts)
    return facts


def train_stage(cfg, source: Path, target: Path, tokenizer, ids: list[int], whole: bool, modules: list[str], rates: tuple[float, ...],
                rows: list[dict], batch_size: int, dev: list[dict], mark: str, log) -> dict:
    """One stage from checkpoint to checkpoint: the rows `ids` of both matrices, with `whole` these matrices, and LoRA on `modules`, if any.

    `rates`: learning rates of rows, matrices and LoRA. The adapter is merged into the 16-bit weights, rows are rounded to them, and dev bits
    per byte are those of the saved model. Returns the facts.
    """
    transformers.set_seed(cfg.seed)
    model = models.load_decoder(str(source), "bf16")
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

    merged = models.load_decoder(str(source), "bf16")
    if modules:
        adapter = target.with_name(f"{target.name}-adapter")
        model.save_pretrained(adapter, save_embedding_layers=False)
        merged = PeftModel.from_pretrained(merged, str(adapter)).merge_and_unload()
        shutil.rmtree(adapter)
    embeddings.write_rows(merged, ids, own, matrices)
    facts |= {"identity": mark, "dev_bits_per_byte": dev_score(cfg, merged, tokenizer, dev)}
    save(target, merged, tokenizer, facts)
    return facts


def relearn(cfg, source: Path, target: Path, tokenizer, known: list[dict], rows: list[dict], batch_size: int, mark: str, log) -> dict:
    """Known-word calibration: overwrite the rows of real words by the mean of the pieces they would be made of, and train these rows as
    stage (a) trains new ones. Saved beside the true rows as {input,output}_{true,start,learnt}, each (words, hidden)."""
    transformers.set_seed(cfg.seed)
    model = models.load_decoder(str(source), "bf16")
    model.config.use_cache = False
    splits = {task.ids_of(tokenizer, f" {k['term']}")[0]: k["pieces"] for k in known}
    ids, kept = sorted(splits), {}
    sides = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
    for side, matrix in sides.items():
        kept[f"{side}_true"] = matrix.detach()[ids].float().clone()
        kept[f"{side}_start"] = embeddings.initial(matrix, [splits[i] for i in ids], cfg.init, side, cfg.seed)
    embeddings.write_rows(model, ids, [kept["input_start"], kept["output_start"]])
    parameters, _ = embeddings.train_rows(model, ids)
    facts = fit(cfg, model, tokenizer, [(parameters, cfg.lr_rows)], rows, batch_size, target.name, log)
    for side, values in zip(sides, (parameters[0], parameters[-1])):
        kept[f"{side}_learnt"] = values.detach().cpu()
    target.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous().cpu() for k, v in kept.items()} | {"ids": torch.tensor(ids)}, target / "rows.safetensors")
    results.write_atomic(target / "stage.json", json.dumps(facts | {"identity": mark}))
    return facts
