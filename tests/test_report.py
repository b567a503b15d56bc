"""The report: reasons complete, rendering repeatable, smoke numbers kept out."""

import json
import shutil

import pytest

from common import report, results


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


def test_a_result_cut_in_half_stops_with_its_name(tmp_path):
    path = tmp_path / "cpu" / "task1_decoder" / "01_data.json"
    results.write_atomic(path, '{"run": "cpu", "rows"')
    with pytest.raises(SystemExit, match=r"01_data\.json is cut short"):
        report.load_all(tmp_path)


def test_an_unknown_marker_is_refused():
    with pytest.raises(SystemExit, match="task1/dat"):
        report.render("<!-- begin task1/dat -->\n<!-- end -->", {})
