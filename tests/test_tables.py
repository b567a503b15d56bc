"""The tables of faults: a loss, or a table without rows, fails; what could not be tried says so."""

import json

import pytest

from pipeline import results
from tests import planted, small, tables


def rows_of(**changed) -> list[dict]:
    return [{"table": name, "fault": "a|b <x>", "result": "ok"} | changed.get(name.split()[0], {})
            for name in tables.TABLES]


@pytest.mark.parametrize(("changed", "exit_code"), [
    ({}, 0), ({"planted": {"result": "caught"}, "faults": {"result": "not tried: no namespaces"}}, 0),
    ({"rubbish": {"result": "traceback"}}, 1), ({"opens": {"table": "rubbish"}}, 1)])
def test_a_row_that_is_not_good_fails(changed, exit_code, tmp_path):
    rows = tmp_path / "rows"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(**changed)))
    assert tables.main(rows, tmp_path) == exit_code
    stored = json.loads((tmp_path / "faults.json").read_text())
    assert set(stored["tables"]) == set(tables.TABLES) and stored["about"]["python"]
    text = (tmp_path / "faults.md").read_text()
    assert r"a\|b \<x\>" in text and "a|b" not in text


def test_nothing_recorded_fails(tmp_path):
    assert tables.main(tmp_path / "rows", tmp_path) == 1


def test_a_row_is_recorded_only_if_asked(record, tmp_path, monkeypatch):
    monkeypatch.delenv("FAULT_ROWS", raising=False)
    record("faults", result="ok")
    monkeypatch.setenv("FAULT_ROWS", str(tmp_path / "rows"))
    record("faults", fault="ü", result="ok")
    assert json.loads((tmp_path / "rows").read_text()) == {"table": "faults", "fault": "ü", "result": "ok"}


def test_the_committed_table_has_the_faults_of_today():
    """Names, places and catchers of tests/planted.py: after a change there, `make faults` makes it again."""
    found = json.loads((results.ROOT / "results" / "faults.json").read_text(encoding="utf-8"))["tables"]
    shown = {(row["fault"], row["file"], row["caught_by"]) for row in found["planted faults"]}
    assert shown == {(fault.name, fault.file, ", ".join(fault.caught_by)) for fault in planted.FAULTS}
    tried = {(row["task"], row["step"]) for row in found["faults"] if row["fault"] == "killed"}
    assert tried >= {(task, step) for task in small.TASKS for step in small.STEPS}
