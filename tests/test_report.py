"""The report: repeatable, without smoke numbers, stopped by missing ones, open about staleness, escaped."""

import json
import shutil

import jinja2
import pytest

from common import results
from report import render


@pytest.fixture
def folder(tmp_path):
    """A copy of the committed results of task 1's first run, for a test to change."""
    source = results.ROOT / "results" / "cpu" / "task1_decoder"
    shutil.copytree(source, tmp_path / "results" / "cpu" / "task1_decoder")
    return tmp_path / "results"


def change(path, edit, **top) -> None:
    """Rewrite a result with `edit` applied to its list of rows and the keys `top` replaced."""
    result = json.loads(path.read_text()) | top
    result["rows"] = edit(result["rows"])
    results.write_atomic(path, json.dumps(result))


def text_of(folder) -> str:
    return render.render(folder)[folder.parent / "report.md"]


def test_all_committed_results_render_and_twice_alike():
    first = render.render(results.ROOT / "results")
    assert first == render.render(results.ROOT / "results")
    names = {"report.md", "loss.svg", "deltas.svg", "curve.svg", "systems.svg", "stages.svg", "texts.svg"}
    assert {path.name for path in first} == names


@pytest.mark.parametrize("task", ["task1_decoder", "task2_encoder", "task3_tokenizer"])
def test_what_the_smoke_pipeline_has_just_made_renders(task, tmp_path):
    source = results.ROOT / "results" / "smoke" / task
    steps = ("01_data", "02_baseline", "03_train", "04_eval")
    if any(results.changed(source / f"{step}.json") for step in steps):
        pytest.skip("no fresh smoke results: make smoke")
    target = shutil.copytree(source, tmp_path / "results" / "smoke" / task)
    for path in target.glob("*.json"):
        change(path, list, profile="cpu")
    assert f"- **{task}** " in text_of(tmp_path / "results")


def test_tasks_without_results_are_said_not_to_have_run(folder):
    assert "- **task2_encoder** (encoder QLoRA): not run" in text_of(folder)


def test_a_smoke_number_never_gets_in(folder):
    for path in (folder / "cpu" / "task1_decoder").glob("*.json"):
        target = folder / "other" / "task1_decoder" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        change(target, lambda rows: [row | dict.fromkeys(("value", "lo", "hi"), 777.125) for row in rows],
               run="other", profile="gpu")
    assert "777.125" in text_of(folder)  # the number would be seen
    for path in (folder / "other" / "task1_decoder").glob("*.json"):
        change(path, list, profile="smoke")
    assert "777.125" not in text_of(folder) and "other" not in {run for run, _, _ in render.load_all(folder)}


@pytest.mark.parametrize("metric", ["nll_per_token", "chrf"])  # one of the headline, one of a table only
def test_a_missing_number_stops_the_rendering_with_its_name(metric, folder):
    given = ("heldout", "tuned", metric)
    change(folder / "cpu" / "task1_decoder" / "04_eval.json", lambda rows: [
        row for row in rows if (row["table"], row.get("name"), row.get("metric")) != given])
    with pytest.raises(jinja2.UndefinedError, match=f"cpu/task1_decoder/04_eval has no row .*{metric}"):
        render.render(folder)


def test_a_stale_result_is_named_with_its_reason_and_remedy(folder):
    path = folder / "cpu" / "task1_decoder" / "01_data.json"
    change(path, list, inputs={})
    assert not any("01_data.json is stale" in line for line in render.problems(folder))
    change(path, list, inputs={"common/corpus.py": "another hash"})
    line = next(line for line in render.problems(folder) if "01_data.json is stale" in line)
    assert "common/corpus.py changed" in line and "make task1" in line
    assert "task1_decoder/01_data (common/corpus.py changed)" in text_of(folder)


def test_check_says_when_the_report_is_out_of_date(folder):
    outdated = f"{folder.parent / 'report.md'} is out of date: make report"
    assert outdated in render.problems(folder)
    for path, text in render.outdated(folder).items():
        results.write_atomic(path, text)
    assert outdated not in render.problems(folder) and not render.outdated(folder)
    results.write_atomic(folder.parent / "report.md", "an earlier text")
    assert outdated in render.problems(folder)


def test_check_names_a_knob_without_a_reason(folder, tmp_path, monkeypatch):
    script = tmp_path / "task9_example" / "03_train.py"
    lines = ["class Config:", "    # Rank of the adapter.", "    lora_r: int = 8", "", "    epochs: int = 1",
             'PROFILES = {"smoke": dict(lora_r=2)}', ""]
    results.write_atomic(script, "\n".join(lines))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert [line for line in render.problems(folder) if "knob" in line] == [
        "task9_example/03_train.py: knob 'epochs' has no reason in a comment above it"]


def test_a_figure_has_the_colour_of_the_verdict_in_the_table(folder):
    row = {"table": "piqa", "name": "delta", "metric": "acc", "p": 0.5, "n": 100}
    for verdict, value in (("improved", 0.25), ("worse", -0.25), ("no difference shown", 0.0)):
        only = row | {"value": value, "lo": value - 0.125, "hi": value + 0.125, "verdict": verdict}

        def replaced(rows, only=only):
            kept = [row for row in rows if row.get("name") != "delta" or row["table"] == "heldout"]
            return [*kept, only, *(only | {"name": name} for name in ("base", "tuned"))]
        change(folder / "cpu" / "task1_decoder" / "04_eval.json", replaced)
        rendered = render.render(folder)
        text = rendered[folder.parent / "report.md"]
        line = next(line for line in text.splitlines() if line.startswith("| piqa "))
        assert line.endswith(f"| {verdict} |")
        figure = next(text for path, text in rendered.items() if path.name == "deltas.svg")
        drawn = {name for name, (colour, _) in render.VERDICTS.items() if f"fill: {colour}" in figure}
        assert drawn == {verdict}


def test_markup_in_data_is_escaped(folder):
    def spoilt(rows):
        return [row | {"output_before": "a|b `c` <img src=x> _d_ **e** [f](g)\nh", "name": "<b>|`"}
                if row["table"] == "examples" else row for row in rows]
    change(folder / "cpu" / "task1_decoder" / "04_eval.json", spoilt)
    lines = [line for line in text_of(folder).splitlines() if "img src=x" in line]
    assert lines and all(line.count("|") == 9 for line in lines)  # eight cells, as in the head of the table
    for raw in ("<img", "`c`", "_d_", "**e**", "[f]", "<b>"):
        assert not any(raw in line for line in lines)


def test_a_result_cut_in_half_stops_with_its_name(folder):
    (folder / "cpu" / "task1_decoder" / "01_data.json").write_text('{"run": "cpu", "rows"')
    with pytest.raises(SystemExit, match=r"01_data\.json is cut short"):
        render.load_all(folder)
