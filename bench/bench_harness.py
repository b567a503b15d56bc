"""How much faster is HarnessLM than the HFLM it extends, and are the answers the same?

Same requests, same process, one after the other. Items: the stock benchmarks, and the questions of ours where
`make task1` has left them.

    python bench/bench_harness.py [items per benchmark, default 20]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

import time

import torch

from bench import measured
from common import models
from pipeline import results

SPEED = "items_per_second"


def main(n: int) -> None:
    measured.need("lm_eval", "lm-eval")
    from lm_eval.models.huggingface import HFLM

    from task1_decoder import harness

    class Stock(harness.HarnessLM):
        """The same model object with lm-eval's own scoring loop."""

        _loglikelihood_tokens = HFLM._loglikelihood_tokens

    tokenizer = models.load_tokenizer("embedded-135m")
    model = models.load_decoder("embedded-135m", "nf4", "auto", True)
    choice = results.ROOT / "runs" / "mine" / "task1_decoder" / "choice.jsonl"
    if not choice.exists():
        choice = results.ROOT / "runs" / "bench" / "no_choice.jsonl"
        results.write_rows(choice, [])
    ours, seconds, answers = harness.HarnessLM, {}, {}
    for name, kind in (("warm-up", ours), ("HFLM", Stock), ("HarnessLM", ours)):
        harness.HarnessLM = kind
        started = time.perf_counter()
        items = n if name != "warm-up" else 2
        answers[name] = harness.evaluate(model, tokenizer, choice, items, batch_size=16)
        seconds[name] = time.perf_counter() - started
    same = [a["acc"] == b["acc"] for task, items in answers["HFLM"].items()
            for a, b in zip(items, answers["HarnessLM"][task])]
    rows = [{"variant": name, "peer": name == "HFLM", SPEED: len(same) / seconds[name],
             "seconds": seconds[name], "items": len(same), "same_answers": sum(same)}
            for name in ("HFLM", "HarnessLM")]
    settings = {"model": "embedded-135m", "items_per_benchmark": n, "benchmarks": list(answers["HFLM"]),
                "batch_size": 16, "compute": models.compute_name(), "threads": torch.get_num_threads()}
    measured.write("harness", settings, rows, SPEED)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
