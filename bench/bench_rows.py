"""How much faster is stage (a) of task 3 than PEFT's trainable tokens? Same untied model, ids, windows, learning rate, same process.

Peer: PEFT's TrainableTokensConfig on both matrices under transformers' own Trainer. Ours: training.fit on embeddings.train_rows, as 03
calls it (no gradient of the frozen rows, the head on real tokens only). Alternating; prints tokens per second of each, the ratio, and how
far the losses of the same steps are apart.

    python bench/bench_rows.py [steps each time, default 6]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone, whatever else is installed

import json
from types import SimpleNamespace

from peft import TrainableTokensConfig, get_peft_model
from transformers import Trainer

from common import models, results
from task3_tokenizer import embeddings, task, training


def once(cfg, source, tokenizer, ids, rows, batch, peer: bool) -> dict:
    model = models.load_decoder(str(source), models.compute_name(cfg.compute))
    model.config.use_cache = False
    if peer:
        model = get_peft_model(model, TrainableTokensConfig(target_modules=["embed_tokens", "lm_head"], token_indices=ids))
        for parameter in (rows_of := [p for p in model.parameters() if p.requires_grad]):
            parameter.data = parameter.data.float()
    else:
        rows_of, _ = embeddings.train_rows(model, ids)
    return training.fit(cfg, model, tokenizer, [(rows_of, cfg.lr_rows)], rows, batch, "bench", lambda **values: None,
                        Trainer if peer else training.WindowTrainer)


def main(steps: int) -> None:
    folder = results.ROOT / "runs" / "cpu" / "task3_tokenizer"
    if not (folder / "new" / "init" / "stage.json").exists():
        raise SystemExit(f"{results.shown(folder / 'new' / 'init')} is missing: make task3")
    cfg = SimpleNamespace(**json.loads((results.ROOT / "results/cpu/task3_tokenizer/03_train.json").read_text())["config"] | {"log_every": 1})
    lexicon = task.lexicon(cfg.model, folder / "terms.json", folder / "tokenizer")
    rows = training.in_turn(results.read_rows(folder / "train.jsonl"), 0, cfg.batch_size, 10)[:steps * cfg.batch_size]
    found: dict[str, list[dict]] = {"PEFT": [], "ours": []}
    for turn in range(2):
        for name in found:
            facts = once(cfg, folder / "new" / "init", lexicon.new, sorted(lexicon.splits), rows, cfg.batch_size, name == "PEFT")
            if turn:  # the first turn warms up
                found[name].append(facts)
    speed = {name: sum(f["tokens"] for f in facts) / sum(f["seconds"] for f in facts) for name, facts in found.items()}
    apart = max(abs(a["value"] - b["value"]) for a, b in zip(found["PEFT"][0]["losses"], found["ours"][0]["losses"]))
    print(f"steps={steps} tokens/s PEFT={speed['PEFT']:.0f} ours={speed['ours']:.0f} ratio={speed['ours'] / speed['PEFT']:.2f} "
          f"largest_loss_difference={apart:.3f} device={results.environment()['device']}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
