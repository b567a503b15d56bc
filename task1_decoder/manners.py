"""Manners: does an answer to a general prompt still do what was asked? The checks of manners.jsonl, by rule.

What counts is which answers the base had right and training lost. So a check may be lenient, but repeating
the prompt must not pass it, nor an answer like "Fruit." to "List three fruits."
"""

import re
from pathlib import Path

from pipeline import results

QUESTIONS = Path(__file__).with_name("manners.jsonl")
MOST_TOKENS = 48  # of an answer: a list of five items has 30
NUMBERS = ["zero|ноль", "one|один", "two|два|две", "three|три", "four|четыре", "five|пять", "six|шесть",
           "seven|семь", "eight|восемь", "nine|девять", "ten|десять", "eleven|одиннадцать",
           "twelve|двенадцать"]
LETTERS = {"cyrillic": "[а-яё]", "latin": "[a-z]"}
LINE = r"^\s*(?:[-*•]|\d+[.)])\s+(.+)"  # of a list
COMMA = r"^[^,]*(?:\bare\b|:)|[,\n]|\b(?:and|и)\b"  # what stands between items, or introduces them
CUT = 20  # words without an end: the limit of tokens has cut the answer


def asked(n: int) -> list[dict]:
    """n of the questions, spread over both languages, 0 = all: {"id", "prompt", "completion": "", "check"}.
    """
    rows = results.read_rows(QUESTIONS)
    return [row | {"completion": ""} for row in rows[::len(rows) // n if n else 1][:n or None]]


def listed(text: str) -> int:
    """How many different items are on the lines of a list, or in one sentence as items of at most 4 words."""
    lists = [re.findall(LINE, text, re.M)]
    for sentence in re.split("[.!?]", text):
        lists.append([item for item in re.split(COMMA, sentence) if len(item.split()) < 5])
    return max(len({item.strip() for item in items} - {""}) for items in lists)


def keeps(check: dict, text: str) -> bool:
    """Whether the answer `text` passes `check`, whose "kind" says what is asked. Upper case does not matter.

    has: one of the words or phrases in "any", whole (for Russian, "any" lists the forms).
    number: the whole number "value", in figures or up to twelve as a word.
    items: a list of at least "least" different items, see `listed`.
    sentence: a sentence of at least "least" words that ends in . ! or ?, or a text that the limit has cut.
    language: at least "least" different words, and most letters from "script" (cyrillic or latin).
    code: every piece of code in "has".
    """
    text, least = text.lower(), check.get("least")
    match check["kind"]:
        case "has":
            return any(re.search(rf"\b{re.escape(one.lower())}\b", text) for one in check["any"])
        case "number":
            names = dict(enumerate(NUMBERS)).get(check["value"], check["value"])
            return bool(re.search(rf"\b(?:{check['value']}|{names})\b", text))
        case "items":
            return listed(text) >= least
        case "sentence":
            sentences = re.findall("[^.!?]+[.!?]", text)
            return len(text.split()) >= CUT or any(len(one.split()) >= least for one in sentences)
        case "language":
            ours = len(re.findall(LETTERS[check["script"]], text))
            return len({*re.findall(r"\w+", text)}) >= least and ours > sum(map(str.isalpha, text)) / 2
        case "code":
            return all(piece.lower() in text for piece in check["has"])
    raise ValueError(check)
