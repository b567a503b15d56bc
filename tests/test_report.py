"""The report: repeatable, without smoke numbers, stopped by missing ones, open about staleness, escaped."""

import json
import re
import shutil

import jinja2
import pytest

from pipeline import fresh, results
from report import render

COMMITTED = (*results.REFERENCE, "bench")


@pytest.fixture
def folder(tmp_path):
    """A copy of the committed results, for a test to change."""
    for name in COMMITTED:
        shutil.copytree(results.ROOT / "results" / name, tmp_path / "results" / name)
    return tmp_path / "results"


@pytest.fixture
def only_report(monkeypatch):
    """No pages and no other document: they take most of the time."""
    monkeypatch.setattr(render, "DOCUMENTS", {"report.md": render.DOCUMENTS["report.md"]})
    monkeypatch.setattr(render, "pages", lambda root, found: {})


def change(path, edit, **top) -> None:
    """Write a result anew with `edit` applied to its list of rows and the keys `top` replaced."""
    result = json.loads(path.read_text()) | {"run": path.parts[-3]} | top
    result["rows"] = edit(result["rows"])
    results.write_atomic(path, results.sealed(result))


def text_of(folder, template="report.md.j2") -> str:
    found = {key: one for key, one in render.load_all(folder).items() if one["profile"] != "smoke"}
    return render.fill(template, folder, found, folder.parent / "report.md")[folder.parent / "report.md"]


def page_of(folder, run="cpu", task="task1_decoder") -> str:
    pages = render.pages(folder, render.load_all(folder, run, task))
    return pages[folder / run / task / "README.md"]


def test_all_committed_results_render_and_twice_alike(folder):
    first, again = render.render(folder), render.pages(folder, render.load_all(folder, "ru"))
    assert {path: first[path] for path in again} == again
    figures = {f"{name}.svg" for name in ("training", "deltas", "systems", "stages", "texts", "losses",
                                          "choices", "dev", "both", "gaps", "texts-both")}
    assert {path.name for path in first} == figures | {*render.DOCUMENTS}
    assert first[folder.parent / "report.md"].count("![") <= 10
    assert render.form_problems(first) == []


@pytest.mark.parametrize("task", ["task1_decoder", "task2_encoder", "task3_tokenizer"])
def test_what_the_smoke_pipeline_has_just_made_renders(task, tmp_path):
    source = results.ROOT / "results" / "smoke" / task
    steps = ("01_data", "02_baseline", "03_train", "04_eval")
    if any(fresh.changed(source / f"{step}.json") for step in steps):
        pytest.skip("no fresh smoke results: make smoke")
    shutil.copytree(source, tmp_path / "results" / "smoke" / task)
    assert "## Verdict" in page_of(tmp_path / "results", "smoke", task)


def test_an_own_run_stands_beside_the_reference_and_a_smoke_run_never_gets_in(folder):
    assert "your run" not in text_of(folder)
    for path in (folder / "cpu" / "task1_decoder").glob("*.json"):
        target = folder / "mine" / "task1_decoder" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        change(target, lambda rows: [row | dict.fromkeys(("value", "lo", "hi"), 777.125) for row in rows])
    for template, words in (("report.md.j2", "your run"), ("report.ru.md.j2", "ваш прогон")):
        text = text_of(folder, template)
        assert text.count("777.125") == 3 and ": differs |" in text and words in text
    for path in (folder / "mine" / "task1_decoder").glob("*.json"):
        change(path, list, profile="smoke")
    assert "777.125" not in text_of(folder)
    page = page_of(folder, "mine")
    assert "777.125" in page and "prove the path only" in page.splitlines()[0]


@pytest.mark.parametrize("table, name, metric", [
    ("heldout", "tuned", "nll_per_token"), ("heldout", "tuned", "chrf")])  # headline; one of a table only
def test_a_missing_number_stops_the_rendering_with_its_name(table, name, metric, folder):
    change(folder / "cpu" / "task1_decoder" / "04_eval.json", lambda rows: [
        row for row in rows if (row["table"], row.get("name"), row.get("metric")) != (table, name, metric)])
    with pytest.raises(jinja2.UndefinedError, match=f"cpu/task1_decoder/04_eval has no row .*{metric}"):
        render.render(folder)


def test_a_missing_reference_run_stops_the_rendering_with_its_name(folder):
    shutil.rmtree(folder / "gpu" / "task2_encoder")
    with pytest.raises(jinja2.UndefinedError, match="gpu/task2_encoder/04_eval is missing"):
        render.render(folder)


def test_a_stale_result_is_named_with_its_reason_and_remedy(folder, only_report):
    path = folder / "cpu" / "task1_decoder" / "01_data.json"
    change(path, list, inputs={})
    assert not any("cpu/task1_decoder/01_data.json is stale" in line for line in render.problems(folder))
    change(path, list, inputs={"sources/corpus.py": "another hash"})
    line = next(line for line in render.problems(folder) if "cpu/task1_decoder/01_data.json is stale" in line)
    assert "sources/corpus.py changed" in line and "make task1" in line
    assert "task1_decoder/01_data (sources/corpus.py changed)" in text_of(folder)


def test_check_says_when_the_report_is_out_of_date(folder, only_report):
    outdated = f"{folder.parent / 'report.md'} is out of date: make report"
    assert outdated in render.problems(folder)
    for path, text in render.outdated(render.render(folder)).items():
        results.write_atomic(path, text)
    assert not [line for line in render.problems(folder) if "out of date" in line]
    results.write_atomic(folder.parent / "report.md", "an earlier text")
    assert outdated in render.problems(folder)


# ---------------------------------------------------------------------------------------- rules of the prose

@pytest.mark.parametrize("text, typed", [
    ("The loss fell to 3.1 in 75 steps.", ["3.1", "75"]), ("It is 12 % shorter.", ["12"]),
    ("Потери упали до 3,1.", ["3,1."]), ("- 40 rows", ["40"]),
    ("{{ t1.gain_cpu | signed }} of {# 12 #} {% if x == 3 %}`SET=a=4`{% endif %} [page 5](a6.md)", []),
    ("SmolLM2-135M in NF4, 4 bits, fp32 or 16-bit (Dettmers et al. 2023), MRR@10, 95 %, task 3", []),
    ("В задаче 2 — 4 бита, задачи 1 и 2, Python 3.10-3.13, Qwen 2 and 3", []),
    ("| 1.4 QLoRA, every value explained | 2 | done |", []), ("1. **A lesson.**", []),
    ("    make task1 SET=n_test=40", []), ("## 2 headings", [])])
def test_figures_typed_into_prose_are_found(text, typed):
    assert render.bare_figures(text) == typed


def test_a_translation_mentions_the_same_numbers_and_is_no_older(tmp_path):
    original, translation = tmp_path / "en" / "a.md.j2", tmp_path / "ru" / "a.md.j2"
    results.write_atomic(original, "It is {{ t1.gain_cpu }}.")
    head = f"{{# translates {results.digest(original.read_text())} #}}\n"
    results.write_atomic(translation, head + "Это {{ t1.gain_cpu }}.")
    assert render.prose_problems(tmp_path) == []
    results.write_atomic(translation, head + "Это {{ t1.gain_gpu }}.")
    assert "['t1.gain_cpu', 't1.gain_gpu']" in render.prose_problems(tmp_path)[0]
    results.write_atomic(translation, head + "Это {{ t1.gain_cpu }}.")
    results.write_atomic(original, "Now it is {{ t1.gain_cpu }}.")
    assert "en/a.md.j2 has changed: translate it" in render.prose_problems(tmp_path)[0]


def test_the_prose_keeps_the_rules():
    assert render.prose_problems(results.ROOT / "report") == []


def test_documents_above_their_size_and_wide_tables_are_named(tmp_path):
    wide = "|" + " --- |" * 9
    problems = render.form_problems({tmp_path / "report.md": f"{wide}\n" + "a" * 60_000,
                                     tmp_path / "results" / "cpu" / "README.md": wide})
    assert [line.split(":")[0] for line in problems] == [
        "report.md has 60,056 bytes, at most 60,000 are wanted", "report.md"]
    assert render.form_problems({tmp_path / "report.md": "a" * 60_001}, sized=False) == []


def test_a_table_torn_by_a_blank_line_is_named(tmp_path):
    table = "| a |\n| --- |\n| 1 |\n"
    assert not render.form_problems({tmp_path / "README.md": f"{table}\n{table}\nWords\n"})
    problem, = render.form_problems({tmp_path / "README.md": f"{table}\n| 2 |\n\nWords\n"})
    assert problem.endswith("a blank line inside a table, before | 2 |")


def test_check_names_a_knob_without_a_reason(folder, only_report, tmp_path, monkeypatch):
    script = tmp_path / "task9_example" / "03_train.py"
    lines = ["class Config:", "    # Rank of the adapter.", "    lora_r: int = 8", "", "    epochs: int = 1",
             'PROFILES = {"smoke": dict(lora_r=2)}', ""]
    results.write_atomic(script, "\n".join(lines))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert [line for line in render.problems(folder) if "knob" in line] == [
        "task9_example/03_train.py: knob 'epochs' has no reason in a comment above it"]


def test_a_figure_has_the_colour_of_the_verdict_in_the_table(folder):
    path = folder / "cpu" / "task1_decoder" / "04_eval.json"
    name = next(row["name"] for row in json.loads(path.read_text())["rows"]
                if row["table"] == "piqa" and row["name"].startswith("tuned minus "))
    row = {"table": "piqa", "name": name, "metric": "acc", "label": "accuracy", "p": 0.5, "n": 100}
    for verdict, value in (("improved", 0.25), ("worse", -0.25), ("no difference shown", 0.0)):
        only = row | {"value": value, "lo": value - 0.125, "hi": value + 0.125, "verdict": verdict}

        def replaced(rows, only=only):
            return [*(row for row in rows if row.get("name") != only["name"] or row["table"] == "headline"
                      or not row["metric"].startswith("acc")), only]
        change(path, replaced)
        rendered = render.pages(folder, render.load_all(folder, "cpu", "task1_decoder"))
        lines = rendered[path.with_name("README.md")].splitlines()
        assert [line for line in lines if line.startswith("| piqa | accuracy | ")
                and line.endswith(f"| 100 | {verdict} |")]
        figure = rendered[path.with_name("deltas.svg")]
        drawn = {name for name, (colour, _) in render.VERDICTS.items() if f"fill: {colour}" in figure}
        assert drawn == {verdict}


def test_markup_in_data_is_escaped(folder):
    def spoilt(rows):
        return [row | {"output_before": "a|b `c` <img src=x> _d_ **e** [f](g)\nh", "name": "<b>|`"}
                if row["table"] == "examples" else row for row in rows]
    change(folder / "cpu" / "task1_decoder" / "04_eval.json", spoilt)
    page = page_of(folder)
    assert "img src=x" in page and "<img" not in page and "[f]" not in page
    lines = [line for line in page.splitlines() if "img src=x" in line]
    assert lines and all(line.count("|") == 7 for line in lines)  # six cells, as in the head of the table
    for raw in ("<img", "`c`", "_d_", "**e**", "[f]", "<b>"):
        assert not any(raw in line for line in lines)


def test_a_result_cut_in_half_stops_with_its_name(folder):
    (folder / "cpu" / "task1_decoder" / "01_data.json").write_text('{"run": "cpu", "rows"')
    with pytest.raises(SystemExit, match=r"01_data\.json is cut short"):
        render.load_all(folder)


def test_an_edited_or_copied_result_stops_report_and_check(folder):
    path = folder / "cpu" / "task1_decoder" / "04_eval.json"
    text = path.read_text()
    path.write_text(re.sub(r'"value": \d', '"value": 9', text, count=1))
    for function in (render.render, render.problems):
        with pytest.raises(SystemExit, match=r"04_eval\.json was edited or copied"):
            function(folder)
    path.write_text(text)
    shutil.copytree(folder / "cpu", folder / "backup")
    for function in (render.render, render.problems):
        with pytest.raises(SystemExit, match=r"backup/task1_decoder/01_data\.json was edited or copied"):
            function(folder)


NASTY = ("![x](http://a.b) <script>1</script> www.a.b ~~s~~ $x$ __init__ a\\\\|b `c`\r\n| d |\r\u202etxt"
         "\u2066\u200b\u2028\x00\x1b[31mred <!-- end --> # h &lt; lora_r")


@pytest.mark.parametrize("show", [render.printed, render.code])
def test_no_markup_and_no_invisible_character_of_data_gets_through(show):
    shown = str(show(NASTY)).removeprefix("<code>").removesuffix("</code>").replace("<br>", " ")
    for raw in "<>|*`[~$\r\n\t\\":
        assert raw not in shown, raw
    for raw in ("://", "www.", " __", "__ ", "&lt; "):
        assert raw not in shown, raw
    assert shown.isprintable()
    for word in ("lora_r", "&#92;u202e", "&#92;u001b&#91;31m"):
        assert word in shown


# ----------------------------------------------------------------------------------- pages of a run, of two

@pytest.fixture
def own(folder):
    """A run "own" on a user's file, as far as the pages of task 1 are concerned, with its texts in runs/."""
    shutil.copytree(folder / "cpu" / "task1_decoder", folder / "own" / "task1_decoder")
    knobs = {"01_data": {"n_test": "40"}, "03_train": {"lora_r": "8"}}  # a step keeps those of its own
    for path in (folder / "own" / "task1_decoder").glob("*.json"):
        config = json.loads(path.read_text())["config"] | {"data": "my <rows>.csv", "instruction": "Sag es."}
        change(path, list, config=config, settings={"data": "my <rows>.csv"} | knobs.get(path.stem, {}),
               inputs={"outside:my <rows>.csv": "0" * 16})
    examples = render.rows(results.read(folder / "own" / "task1_decoder" / "04_eval.json"), table="examples")
    results.write_rows(folder.parent / "runs" / "own" / "task1_decoder" / "test.jsonl", [
        {"id": row["id"], "prompt": f"PROMPT <b>{i}</b>", "completion": "REFERENCE"}
        for i, row in enumerate(examples)])
    return folder


def test_the_page_of_an_own_run_says_what_a_user_asks(own):
    page = page_of(own, "own")
    for words in ("NLL per token", "improved", "my &#60;rows&#62;.csv", "Sag es.", "make task1 RUN=own DATA=",
                  "only the name is kept", "PROMPT &#60;b&#62;0&#60;/b&#62;", "REFERENCE", "rows to train on",
                  "![Training curve](training.svg)", "runs/own/task1_decoder/merged", "2 cores", "torch"):
        assert words in page, words
    cells = {line.count("|") for line in page.splitlines() if "| held-out rows | " in line}
    assert cells == {3, 9} and "prove the path only" not in page
    assert "PROMPT" not in page_of(own, "cpu")  # of the corpus only names
    again, = [line for line in page.splitlines() if line.startswith("| again ")]
    assert "n_test=40" in again and "lora_r=8" in again


def test_the_page_asks_with_the_system_message_that_the_rows_bring(own):
    path = own.parent / "runs" / "own" / "task1_decoder" / "test.jsonl"
    results.write_rows(path, [row | {"instruction": "Antworte."} for row in results.read_rows(path)])
    page = page_of(own, "own")
    assert "of each row its own, such as <code>Antworte.</code>" in page
    assert """{"role": "system", "content": 'Antworte.'}""" in page


def test_a_page_does_with_the_steps_there_are(own):
    task, page = own / "own" / "task1_decoder", page_of(own, "own")
    for step, gone in (("04_eval", "## Before and after"), ("03_train", "## Training"),
                       ("02_baseline", "million")):
        assert gone in page
        (task / f"{step}.json").unlink()
        page = page_of(own, "own")
        assert gone not in page and f"Not there yet: {step}" in page and "make task1 RUN=own" in page


def items(shift: float) -> dict:
    """Scored items of task 1, whose NLL rises with `shift`."""
    scores = {"chrf": 30.0, "rouge_l": 0.5, "stopped": True, "new_tokens": 8, "repetition": 0.0,
              "copied": False, "correct": 4, "bytes": 40, "tokens": 8}
    held_out = [scores | {"id": f"r{i}", "nats": 20.0 + i + shift * (1 + i % 3)} for i in range(24)]
    return {"heldout": held_out, "general": held_out[:8]}


def with_items(folder, run: str, stored: dict) -> None:
    """Items under runs/, as an 04 that knows their hash would have left them."""
    path = folder.parent / "runs" / run / "task1_decoder" / "items_tuned.json"
    results.write_atomic(path, json.dumps(stored))
    change(folder / run / "task1_decoder" / "04_eval.json", list,
           artifacts={"items_tuned.json": results.sha256(path)})


def test_two_runs_side_by_side_are_paired_where_the_items_are_the_same(own):
    first, other = items(0.0), items(-4.0)
    first["manners"] = [{"id": f"q{i}", "kept": 0} for i in range(12)]
    other["manners"] = [item | {"kept": 1} for item in first["manners"]]
    with_items(own, "cpu", first)
    other["general"] = [item | {"tokens": 9} for item in other["general"]]  # of another tokenizer
    with_items(own, "own", other)
    page = render.side_by_side(own, "cpu", "own")[own / "cpu+own" / "task1_decoder" / "README.md"]
    line = next(line for line in page.splitlines() if line.startswith("| held-out rows | NLL per token"))
    assert "\u22121 [" in line and "| < 0.001 | 24 | <code>own</code> |" in line
    line = next(line for line in page.splitlines() if line.startswith("| general questions | general quest"))
    assert "| < 0.001 | 12 | <code>own</code> |" in line
    line = next(line for line in page.splitlines() if line.startswith("| general English | NLL per token"))
    assert line.endswith("| – |")  # nats per token of two tokenizers have no difference
    assert "Both were scored on the same items" in page and "my &#60;rows&#62;.csv" in page


def test_two_runs_on_other_items_stand_with_an_interval_each(own):
    with_items(own, "cpu", items(0.0))
    with_items(own, "own", items(-4.0))
    (own.parent / "runs" / "own" / "task1_decoder" / "items_tuned.json").write_text("{}")
    target = own / "cpu+own" / "task1_decoder" / "README.md"
    page = render.side_by_side(own, "cpu", "own")[target]
    assert "not under runs/ of this machine" in page and "difference [95 %]" not in page
    change(own / "own" / "task1_decoder" / "01_data.json", list, artifacts={"test.jsonl": "another"})
    page = render.side_by_side(own, "cpu", "own")[target]
    assert "not scored on the same items" in page and "difference [95 %]" not in page
    assert render.side_by_side(own, "cpu", "nothing") == {}
    with pytest.raises(SystemExit, match="RUNS='cpu nothing': expected one run, or two"):
        render.main(["cpu", "nothing"])
    with pytest.raises(SystemExit, match="RUNS='nothing': expected one run, or two"):
        render.main(["nothing"])


def test_the_summary_puts_a_run_beside_the_reference(own):
    """The same run under another name agrees, one of other data is not compared, another result differs."""
    shutil.copytree(own / "cpu" / "task1_decoder", own / "repeated" / "task1_decoder")
    path = own / "repeated" / "task1_decoder" / "04_eval.json"
    for each in path.parent.glob("*.json"):
        change(each, list)
    assert "agrees" in render.summary(own, "repeated")
    assert "other data, instruction" in render.summary(own, "own")
    far = {"lo": 9.0, "value": 9.1, "hi": 9.2}
    change(path, lambda rows: [row | (far if row["table"] == "headline" else {}) for row in rows])
    head, line = render.summary(own, "repeated").splitlines()
    assert head.split() == ["task", "what", "repeated", "reference"]
    assert "+9.100 [+9.000, +9.200]" in line and line.endswith("differs")
    assert "no reference" in render.summary(own, "cpu")
