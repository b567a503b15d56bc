"""How much faster is HarnessLM than the HFLM it extends? Prints the ratio and the agreement of the answers.

Same requests, same process, one after the other.

    python bench/bench_harness.py [items per benchmark, default 20]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules of this clone

import time

from lm_eval.models.huggingface import HFLM

from common import models, results
from task1_decoder import harness


class Stock(harness.HarnessLM):
    """The same model object with lm-eval's own scoring loop."""

    _loglikelihood_tokens = HFLM._loglikelihood_tokens


def main(n: int) -> None:
    tokenizer = models.load_tokenizer("embedded-135m")
    model = models.load_decoder("embedded-135m", "nf4", "auto", True)
    choice = results.ROOT / "runs" / "cpu" / "task1_decoder" / "choice.jsonl"
    if not choice.exists():
        raise SystemExit(f"{results.shown(choice)} is missing: make task1")
    ours, seconds, answers = harness.HarnessLM, {}, {}
    for name, kind in (("warm-up", ours), ("HFLM", Stock), ("HarnessLM", ours)):
        harness.HarnessLM = kind
        started = time.perf_counter()
        items = n if name != "warm-up" else 2
        answers[name] = harness.evaluate(model, tokenizer, choice, items, batch_size=16)
        seconds[name] = time.perf_counter() - started
    same = [a["acc"] == b["acc"] for task, items in answers["HFLM"].items()
            for a, b in zip(items, answers["HarnessLM"][task])]
    print(f"items={len(same)} HFLM={seconds['HFLM']:.1f}s HarnessLM={seconds['HarnessLM']:.1f}s "
          f"ratio={seconds['HFLM'] / seconds['HarnessLM']:.2f} same_answers={sum(same)}/{len(same)} "
          f"device={results.environment()['device']}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
