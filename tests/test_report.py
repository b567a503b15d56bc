"""The report: reasons complete, rendering repeatable, smoke numbers kept out."""

import json
import shutil

import pytest

from common import report, results, spread


def test_every_knob_and_every_profile_override_has_a_reason():
    checked = 0
    for path in sorted(results.ROOT.glob("task*/*.py")):
        for name, knob in results.knobs(path).items():
            reasons = ([knob["reason"]] if knob["value"] else []) + [p["reason"] for p in knob["profiles"].values()]
            assert all(reasons), f"{results.shown(path)}: knob {name!r} has no reason in a comment beside or above it"
            checked += len(reasons)
    assert checked > 30


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """report.md rendered in a copy whose results hold, beside the committed runs, one smoke run with a telling number."""
    shutil.copytree(results.ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("smoke"))
    source = next((tmp_path / "results").glob("*/task1_decoder/04_eval.json"))
    smoke = json.loads(source.read_text()) | {"run": "smoke", "profile": "smoke"}
    for row in smoke["rows"]:
        if "value" in row:
            row["value"] = 777.125
    results.write_atomic(tmp_path / "results" / "smoke" / "task1_decoder" / "04_eval.json", json.dumps(smoke))
    found = report.load_all(tmp_path / "results")
    return report.render(report.REPORT.read_text(encoding="utf-8"), found), found


def test_rendering_twice_is_identical_and_holds_no_smoke_number(rendered):
    text, found = rendered
    assert report.render(text, found) == text
    assert "777.125" not in text and "smoke" not in {run for run, _, _ in found}


def test_figures_are_the_same_bytes_twice(rendered):
    found = rendered[1]
    assert report.figures(found) == report.figures(found) and len(report.figures(found)) >= 2


def test_committed_report_is_current(rendered):
    text = rendered[0]
    assert report.REPORT.read_text(encoding="utf-8") == text, "make report"


def trained(run, processes, losses, speed, **config):
    rows = [{"table": "training", "metric": "processes", "value": processes}]
    rows += [{"table": "curve", "metric": "loss", "step": step, "value": loss} for step, loss in losses.items()]
    return {(run, "task1_decoder", "03_train"): {"run": run, "config": {"seed": 0} | config, "rows": rows, "env": {"device": "two of them"},
                                                 "cost": {"tokens_per_second": speed}}}


def test_one_process_is_compared_with_several_of_the_same_configuration():
    found = trained("one", 1, {10: 3.0, 20: 2.0}, 1000.0) | trained("two", 2, {10: 3.0, 20: 2.5}, 1900.0)
    line = spread.several("task1_decoder")(found).splitlines()[2]
    assert line == "| 2 | two of them | 1,000 | 1,900 | 1.90 | 0.2500 | 0.5000 | 2 |"
    assert "results/two/task1_decoder/processes.svg" in spread.several("task1_decoder")(found)
    assert [path.parent.parent.name for path in spread.figure(found, "task1_decoder")] == ["two"]
    other = trained("one", 1, {10: 3.0}, 1000.0) | trained("two", 2, {10: 3.0}, 1900.0, seed=1)
    assert "not run" in spread.several("task1_decoder")(other) and not spread.figure(other, "task1_decoder")


def test_a_result_cut_in_half_stops_with_its_name(tmp_path):
    path = tmp_path / "cpu" / "task1_decoder" / "01_data.json"
    results.write_atomic(path, '{"run": "cpu", "rows"')
    with pytest.raises(SystemExit, match=r"01_data\.json is cut short"):
        report.load_all(tmp_path)


def test_an_unknown_marker_is_refused():
    with pytest.raises(SystemExit, match="task1/dat"):
        report.render("<!-- begin task1/dat -->\n<!-- end -->", {})
