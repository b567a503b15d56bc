"""Try what a run has learnt: a prompt, a question or a text of yours, before and after, side by side.

    python ask.py 1 "def add(a, b): return a + b"     the answers of the decoder
    python ask.py 2 "shortest path in a graph"        the first five documents of the search
    python ask.py 3 "In sympy, an undirected graph"   tokens with their ids, and how the text goes on

`make ask TASK=1 PROMPT="..." RUN=name` is the same. It reads what the run left in results/ and runs/, where
a model folder outside the repository is known by its name only: MODEL= says where it lies.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules of this clone

from pipeline import knobs, results, runner

TASKS = {"1": "task1_decoder", "2": "task2_encoder", "3": "task3_tokenizer"}
SHOWN = 5  # documents of a search


def run_of(args, config_class) -> runner.Run:
    """The run as the functions of its task want it. SystemExit if its training has not ended."""
    folder = TASKS[args.task]
    result = results.read(results.ROOT / "results" / args.run / folder / "03_train.json")
    changes = {"model": args.model} if args.model else {}
    settings = result["settings"]
    named = SimpleNamespace(profile=result["profile"], run=args.run, settings=settings, asked=settings)
    return runner.Run(named, results.ROOT / folder / "03_train.py",
                      knobs.config_of(config_class, result["config"], **changes))


def decoder(args) -> dict[str, list[str]]:
    """The greedy answers of the base and of the tuned model, both in the format that was trained."""
    from peft import PeftModel

    from common import models
    from task1_decoder import scoring, task
    run = run_of(args, task.Config)
    style = run.rows("test")[0].get("style", "chat")
    cfg, tokenizer = run.cfg, models.load_tokenizer(run.cfg.model)
    prompt = task.Prompt(tokenizer, cfg, style=style)
    examples = [prompt.encode({"id": "asked", "prompt": args.text, "completion": ""})]
    model = models.load_decoder(cfg.model, cfg.precision, cfg.compute, cfg.double_quant)
    model = PeftModel.from_pretrained(model, run.artifact("03_train", "adapter")).eval()

    def answer():
        return [scoring.score_answers(model, tokenizer, examples, 1, 2 * cfg.max_new_tokens)[0]["text"]]
    with model.disable_adapter():
        before = answer()
    return {"before": before, "after": answer()}


def encoder(args) -> dict[str, list[str]]:
    """The documents of the pool that the base and the tuned encoder find first, by name or first line."""
    from task2_encoder import task
    run = run_of(args, task.Config)
    rows = run.rows("test")
    pool = task.retrieval([row for row in rows if row["pool"]])
    asked = pool._replace(queries={"asked": args.text}, relevant={"asked": set()})
    own = run.cfg.data != "corpus"
    called = {row["id"]: row["positive"].splitlines()[0] if own else row["name"] for row in rows}
    found = {}
    for when, model in (("before", task.load_encoder(run.cfg)),
                        ("after", task.load_adapter(run.artifact("03_train", "adapter"), run.cfg))):
        (scores,) = task.by_cosine(asked, task.embed(model, asked, run.cfg.eval_batch_size))
        best = sorted(scores.items(), key=lambda item: -item[1])[:SHOWN]
        found[when] = [f"{score:.3f} {called[document]}" for document, score in best]
    return found


def tokenizer(args) -> dict[str, list[str]]:
    """The tokens of the text and its greedy continuation, by the model as it was and after the last stage."""
    from common import models
    from task3_tokenizer import task
    run = run_of(args, task.Config)
    lexicon, found, compute = task.lexicon(run), {}, models.compute_name(run.cfg.compute)
    last = str(run.artifact("03_train", f"new/{task.STAGES[-1]}"))
    for when, source, way in (("before", run.cfg.model, lexicon.old), ("after", last, lexicon.new)):
        ids = task.ids_of(way, args.text)
        pieces = " ".join(f"{way.decode([i])!r} {i}" for i in ids)
        (written,) = task.generate(models.load_decoder(source, compute), way, [args.text], 24)
        found[when] = [f"{len(ids)} tokens: {pieces}", args.text + way.decode(written)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("text")
    parser.add_argument("--run", default="mine")
    parser.add_argument("--model", help="where the base lies, if it is a folder outside the repository")
    args = parser.parse_args()
    if not args.text.strip():
        raise SystemExit('nothing asked: PROMPT="..."')
    for when, lines in {"1": decoder, "2": encoder, "3": tokenizer}[args.task](args).items():
        print(f"{when}:", *(f"  {results.visible(line)}" for line in lines), sep="\n")


if __name__ == "__main__":
    main()
