"""General prompts with answers that a rule can check, and other prompts to rehearse."""

import re
from collections import Counter

import pytest

from pipeline import results
from task1_decoder import basket, manners

FOLDER = results.ROOT / "task1_decoder"
ROWS = results.read_rows(FOLDER / "manners.jsonl")
REHEARSED = results.read_rows(FOLDER / "rehearsal.jsonl")
KINDS = {"has": {"any"}, "number": {"value"}, "items": {"least"}, "sentence": {"least"},
         "language": {"script", "least"}, "code": {"has"}}
COLOUR = {"kind": "has", "any": ["white", "sky blue", "белый", "c"]}
TWO, FORTY = {"kind": "number", "value": 2}, {"kind": "number", "value": 40}
THREE = {"kind": "items", "least": 3}
SENTENCE = {"kind": "sentence", "least": 5}
RUSSIAN = {"kind": "language", "script": "cyrillic", "least": 3}
CODE = {"kind": "code", "has": ["for ", "Range("]}
# What a fine-tuned model says: the check of no row may take it.
SHORT = ["Fruit.", "Capital of the country.", "The number of things.", "A list of names.", "Столица.",
         "Return it.", ""]


def grams(text: str) -> set[tuple]:
    """Every four consecutive words of a text, or all of a shorter one."""
    found = re.findall(r"\w+", text.lower().replace("ё", "е"))
    return {tuple(found[i:i + 4]) for i in range(max(1, len(found) - 3))}


# ---------------------------------------------------------------------------------------------- the rules

@pytest.mark.parametrize(("check", "text"), [
    (COLOUR, "Snow is WHITE."), (COLOUR, "It is sky blue"), (COLOUR, "Снег белый."), (COLOUR, "(c) C"),
    (TWO, "2"), (TWO, "You have 4-2=2 left"), (TWO, "Two wheels."), (TWO, "Два."), (TWO, "**2**"),
    (FORTY, "40!"),
    (THREE, "1. Apples\n2. Pears\n3. Plums"),
    (THREE, "Here are three:\n\n- Apples: sweet, red\n* Pears\n• Plums"),
    (THREE, "Red, green and blue."),
    (THREE, "The three primary colours of light are red, green, and blue. Yes."),
    (THREE, "Sure: кошка, собака и хомяк"), (THREE, "Apples\nPears\nPlums"), (THREE, "1, 2, 3, 4"),
    (THREE, "Sure! 1) Apples\n2) Pears\n3) Plums"),
    (SENTENCE, "The sea is very deep."), (SENTENCE, "Yes. Is the sea very deep? It"),
    (SENTENCE, "the sea " * 10),
    (RUSSIAN, "Дождь — это вода"), (RUSSIAN, "По-русски: hi, это привет"),
    (CODE, "```python\nfor i in range(3):\n```")])
def test_right_answers(check, text):
    assert manners.keeps(check, text)


@pytest.mark.parametrize(("check", "text"), [
    (COLOUR, "Whitely"), (COLOUR, "Sky, blue"), (COLOUR, ""),
    (TWO, "12"), (TWO, "twofold"), (TWO, "three"), (FORTY, "forty"), (FORTY, "140"),
    (THREE, "Fruit."), (THREE, "Apples and pears."), (THREE, "1. Plums\n2. Plums\n3. Plums"),
    (THREE, "red, red, red, red"), (THREE, "Three fruits are: apples, pears"), (THREE, ""),
    (THREE, "Fruits, which people in many countries eat, and which they have always liked a lot."),
    (SENTENCE, "The sea is deep."), (SENTENCE, "The sea is very deep"), (SENTENCE, "The sea. It is very"),
    (SENTENCE, ""),
    (RUSSIAN, "Это дождь"), (RUSSIAN, "Rain is water, дождь"), (RUSSIAN, "1 2 3"), (RUSSIAN, "да нет " * 9),
    (RUSSIAN, ""),
    (CODE, "for each range"), (CODE, "")])
def test_wrong_answers(check, text):
    assert not manners.keeps(check, text)


def test_latin_letters_and_an_unknown_kind():
    assert manners.keeps(RUSSIAN | {"script": "latin"}, "Rain is water, дождь")
    with pytest.raises(ValueError, match="riddle"):
        manners.keeps({"kind": "riddle"}, "x")


# ---------------------------------------------------------------------------------------------- the files

def test_rows_are_many_and_in_two_languages():
    assert len(ROWS) >= 60 and sum(row["language"] == "ru" for row in ROWS) >= 15
    assert len(REHEARSED) >= 100 and all(set(row) == {"id", "prompt"} for row in REHEARSED)
    assert {row["language"] for row in ROWS} == {"en", "ru"}
    for rows in (ROWS, REHEARSED):
        for key in ("id", "prompt"):
            assert Counter(row[key] for row in rows).most_common(1)[0][1] == 1
        assert not any(re.search(r"\bfunction\b|функци", row["prompt"], re.I) for row in rows)


def test_russian_rows_are_russian():
    def russian(row) -> bool:
        return bool(re.search("[а-яё]", row["prompt"]))
    assert [row["id"] for row in ROWS if russian(row) != (row["language"] == "ru")] == []
    assert sum(map(russian, REHEARSED)) >= 20


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_a_check_is_of_a_known_kind_and_takes_no_rubbish(row):
    assert set(row["check"]) == KINDS[row["check"]["kind"]] | {"kind"}
    assert [text for text in [row["prompt"], *SHORT] if manners.keeps(row["check"], text)] == []


def test_no_rehearsed_prompt_shares_four_words_with_a_measured_one():
    measured = {gram: row["prompt"] for row in ROWS for gram in grams(row["prompt"])}
    measured |= {gram: text for text in basket.GENERAL + basket.RUSSIAN for gram in grams(text)}
    shared = [(row["prompt"], measured[gram]) for row in REHEARSED for gram in grams(row["prompt"])
              if gram in measured]
    assert shared == []


@pytest.mark.parametrize(("prompt", "answer"), [
    ("What is the capital of Japan?", "Tokyo is the capital of Japan."),
    ("What is the opposite of hot?", "Cold"),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Name three colours.", "Three colours are red, yellow and blue."),
    ("What is rain?", "Rain is water that falls from clouds in drops."),
    ("Is fire cold?", "No, fire is hot."),
    ("Write a line of Python that prints the word hello.", '```python\nprint("hello")\n```'),
    ("Какого цвета трава?", "Трава зелёного цвета."),
    ("Сколько дней в неделе?", "В неделе семь дней."),
    ("Перечисли четыре времени года.", "Зима, весна, лето и осень."),
    ("Что такое дождь?", "Дождь — это капли воды, которые падают из облаков."),
    ("Answer in Russian: what is your name?", "Меня зовут Анна.")])
def test_a_good_answer_passes(prompt, answer):
    (check,) = (row["check"] for row in ROWS if row["prompt"] == prompt)
    assert manners.keeps(check, answer)
