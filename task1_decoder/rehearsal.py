"""What task 1 rehearses so that it is not forgotten: the base's own answers to general questions."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import transformers

from common import models, training
from pipeline import results
from task1_decoder import scoring, task

QUESTIONS = Path(__file__).with_name("rehearsal.jsonl")  # none of those in manners.jsonl


def rows(run, cfg) -> list[dict]:
    """The 16-bit base's answers to general questions, as rows {"id", "prompt", "completion"}.

    They are drawn from its probabilities. Its most probable answers, 5 % of 400 x 32 rows, took the NLL of
    general English from 2.976 to 3.106 (embedded-2b); drawn ones left it at 2.975.
    """
    n = round(cfg.rehearsal * cfg.max_steps * cfg.batch_size)
    if not n:
        return []
    run.track(QUESTIONS)
    questions, rng = results.read_rows(QUESTIONS), random.Random(cfg.seed)
    asked = [row | {"completion": ""} for _ in range(0, n, len(questions))
             for row in rng.sample(questions, len(questions))][:n]

    def answer():
        transformers.set_seed(cfg.seed)
        tokenizer = models.load_tokenizer(cfg.model)
        model = models.load_decoder(cfg.model, models.compute_name(cfg.compute))
        prompts = task.encode(tokenizer, asked, replace(cfg, instruction=""))
        items = scoring.score_answers(model, tokenizer, prompts, cfg.eval_batch_size,
                                      cfg.max_completion_tokens, sample=True)
        return {"rows": [row | {"completion": item["text"]} for row, item in zip(asked, items)]}
    given = [cfg.model, cfg.compute, cfg.seed, cfg.max_completion_tokens, asked]
    with training.main_process_first():
        return results.cached(run.folder / f"rehearsal-{cfg.seed}.json", given, answer)["rows"]
