"""Known-word calibration, how good a new row can get: real single-token words are hidden, learnt again and compared with what they were."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
import transformers

from common import models, results
from task3_tokenizer import embeddings, intrinsic, task, training


def relearn(cfg, source: Path, target: Path, tokenizer, known: list[dict], rows: list[dict], batch_size: int, mark: str, log) -> dict:
    """Overwrite the rows of real words by the mean of the pieces they would be made of, and train these rows as stage (a) trains new ones.
    Saved beside the true rows as {input,output}_{true,start,learnt}, each (words, hidden)."""
    transformers.set_seed(cfg.seed)
    model = models.load_decoder(str(source), models.compute_name(cfg.compute))
    model.config.use_cache = False
    splits = {task.ids_of(tokenizer, f" {k['term']}")[0]: k["pieces"] for k in known}
    ids, kept = sorted(splits), {}
    sides = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
    for side, matrix in sides.items():
        kept[f"{side}_true"] = matrix.detach()[ids].float().clone()
        kept[f"{side}_start"] = embeddings.initial(matrix, [splits[i] for i in ids], cfg.init, side, cfg.seed)
    embeddings.write_rows(model, ids, [kept["input_start"], kept["output_start"]])
    parameters, _ = embeddings.train_rows(model, ids)
    # the rate of (a) as it is, though batches are smaller: a row has as many windows in a step as there
    facts = training.fit(cfg, model, tokenizer, [(parameters, cfg.lr_rows)], rows, batch_size, target.name, log)
    for side, values in zip(sides, (parameters[0], parameters[-1])):
        kept[f"{side}_learnt"] = values.detach().cpu()
    target.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous().cpu() for k, v in kept.items()} | {"ids": torch.tensor(ids)}, target / "rows.safetensors")
    results.write_atomic(target / "stage.json", json.dumps(facts | {"identity": mark}))
    return facts


def judge(cfg, run, tokenizer, known: list[dict], windows: list[dict]) -> list[dict]:
    """Result rows: the rows learnt again against the true ones, from inside and by the probability of the word in held-out `windows`."""
    kept = safetensors.torch.load_file(run.artifact("03_train", "known") / "rows.safetensors")
    ids, table = kept["ids"].tolist(), []
    source = run.artifact("03_train", "control/init")
    model = models.load_decoder(str(source), models.compute_name(cfg.compute))
    words = intrinsic.whole_words(tokenizer)
    for side, matrix in (("input", model.get_input_embeddings().weight), ("output", model.get_output_embeddings().weight)):
        for which in ("start", "learnt"):
            found = intrinsic.against_truth(matrix, ids, kept[f"{side}_{which}"], words)
            table += [{"table": "known", "model": f"{side} {which}", "metric": m, "value": sum(f[m] for f in found) / len(found), "n": len(found),
                       "per_word": [f[m] for f in found]} for m in ("cosine", "rank", "overlap")]
            norms = [kept[f"{side}_{w}"].norm(dim=1).mean().item() for w in (which, "true")]
            table.append({"table": "known", "model": f"{side} {which}", "metric": "norm_over_true", "value": norms[0] / norms[1], "n": len(found)})
    scored = {}
    for which in ("true", "start", "learnt"):
        embeddings.write_rows(model, ids, [kept[f"input_{which}"], kept[f"output_{which}"]])
        scored[which] = task.score(model, tokenizer, windows, cfg.eval_batch_size)
        table += [row | {"table": "known uses"} for row in task.rows_of({"uses": scored[which]}, which) if row["metric"] != "tokens_per_byte"]
    for metric in ("bits_per_byte", "term_bits", "after_bits_per_byte", "reciprocal_rank"):
        table.append(task.delta_row("known uses", "learnt minus true", metric, scored["true"], scored["learnt"]))
    table += [{"table": "known words", "model": k["term"], "metric": "pieces", "value": len(k["pieces"])} for k in known]
    return table
