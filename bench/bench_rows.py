"""How much faster is stage (a) of task 3 than PEFT's trainable tokens?

Same untied model, ids, windows and learning rate in the same process. Peer: PEFT's TrainableTokensConfig on
both matrices under transformers' own loss. Ours: `fit` of 03 on embeddings.train_rows (no gradient of the
frozen rows, the head on real tokens only). They take turns; the result says how far the losses of the same
steps are apart.

    python bench/bench_rows.py [steps each time, default 6] [run, default mine]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

import importlib
from types import SimpleNamespace

import torch
from transformers import Trainer

from bench import measured
from common import models
from pipeline import knobs, results
from task3_tokenizer import embeddings, task, windows

script = importlib.import_module("task3_tokenizer.03_train")
OURS, SPEED = script.WindowTrainer, "tokens_per_second"


class Stock(Trainer):
    """The library's loss: logits of every position, padding included."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :self.n_start] = -100
        return model(**inputs, labels=labels).loss


def once(cfg, source, lexicon, rows, peer: bool) -> dict:
    """Stats of one training from the checkpoint `source`."""
    model, ids = models.load_decoder(str(source), models.compute_name(cfg.compute)), sorted(lexicon.pieces_of)
    model.config.use_cache = False
    if peer:
        from peft import TrainableTokensConfig, get_peft_model
        tokens = TrainableTokensConfig(target_modules=["embed_tokens", "lm_head"], token_indices=ids)
        model = get_peft_model(model, tokens)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
    else:
        trained, _ = embeddings.train_rows(model, ids)
    script.WindowTrainer = Stock if peer else OURS
    learn = [{"params": trained, "lr": cfg.lr_rows}]
    return script.fit(cfg, model, lexicon.new, learn, rows, cfg.batch_size, [])


def main(steps: int, run: str) -> None:
    measured.need("peft", "peft")
    folder = results.ROOT / "runs" / run / "task3_tokenizer"
    if not (folder / "new" / "init").exists():
        raise SystemExit(f"{results.shown(folder / 'new' / 'init')} is missing: make task3 RUN={run}")
    stored = results.read(results.ROOT / "results" / run / "task3_tokenizer" / "03_train.json")
    cfg = knobs.config_of(script.Config, stored["config"], log_every=1)
    lexicon = task.lexicon(SimpleNamespace(cfg=cfg, artifact=lambda step, name: folder / name))
    rows = windows.interleave_terms(results.read_rows(folder / "train.jsonl"), 0, cfg.batch_size)
    stats: dict[str, list[dict]] = {"PEFT": [], "ours": []}
    for turn in range(3):
        for name, done in stats.items():
            one = once(cfg, folder / "new" / "init", lexicon, rows[:steps * cfg.batch_size], name == "PEFT")
            if turn:  # the first turn warms up
                done.append(one)
    apart = max(abs(a["value"] - b["value"]) for a, b in zip(*(done[0]["losses"] for done in stats.values())))
    table = [{"variant": name, "peer": name == "PEFT",
              SPEED: sum(one["tokens"] for one in done) / sum(one["seconds"] for one in done),
              "loss_first": done[0]["losses"][0]["value"], "loss_last": done[0]["losses"][-1]["value"],
              "largest_loss_difference": apart, "steps": steps} for name, done in stats.items()]
    settings = {"model": results.public(cfg.model), "steps": steps, "batch_size": cfg.batch_size,
                "compute": models.compute_name(), "threads": torch.get_num_threads()}
    measured.write("rows", settings, table, SPEED)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 6, given[1] if given[1:] else "mine")
