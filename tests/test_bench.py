"""What the benches write, and that a missing peer is one line."""

import importlib
import importlib.util
import json

import pytest

from bench import measured
from pipeline import results

PEERS = {"decoder": "trl", "encoder": "sentence-transformers", "harness": "lm-eval", "rows": "peft"}
ROWS = [{"variant": "peer", "peer": True, "rows": 8, "speed": 100.0},
        {"variant": "best peer", "peer": True, "rows": 8, "speed": 200.0},
        {"variant": "ours", "peer": False, "rows": 8, "speed": 300.0},
        {"variant": "peer", "peer": True, "rows": 32, "error": "out of memory"},
        {"variant": "ours", "peer": False, "rows": 32, "speed": 400.0}]


def test_a_ratio_is_to_the_best_peer_of_the_same_size():
    ratios = [row.get("ratio") for row in measured.with_ratios(ROWS, "speed")]
    assert ratios == [0.5, 1.0, 1.5, None, None]


def test_a_bench_run_in_parts_is_one_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "FOLDER", tmp_path / "results" / "bench")
    monkeypatch.setattr(measured, "has_gpu", lambda: False)
    measured.write("toy", {"steps": 4, "compute": "fp32"}, ROWS[:2], "speed")
    measured.write("toy", {"steps": 4, "compute": "fp32"}, ROWS[2:], "speed")
    path = tmp_path / "results" / "bench" / "toy-cpu.json"
    stored = results.read(path)
    assert [(row["variant"], row["rows"]) for row in stored["rows"]] == [
        (row["variant"], row["rows"]) for row in ROWS]
    assert stored["rows"][2]["ratio"] == 1.5 and {"date", "commit", "device", "torch"} <= stored["env"].keys()
    assert "best peer" in capsys.readouterr().out and list(path.parent.iterdir()) == [path]
    # other settings: another result
    measured.write("toy", {"steps": 5, "compute": "fp32"}, ROWS[:1], "speed")
    assert len(json.loads(path.read_text())["rows"]) == 1
    measured.write("toy", {"steps": 5, "compute": "bf16"}, ROWS[:1], "speed")  # a CPU with fast bf16
    assert {file.stem for file in path.parent.iterdir()} == {"toy-cpu", "toy-cpu-bf16"}


def test_warm_up_and_recordings_are_no_part_of_the_speed():
    clock = measured.Clock()
    clock.marks, clock.losses = [0.0, 5.0, 6.0, 7.0, 8.0, 12.0, 13.0], [3.0, 2.0, 1.0]
    values = clock.values("tokens", [10] * 6, slow={4})
    assert values["tokens_per_second"] == 10 and values["step_seconds"] == 1
    assert values["warm_up_seconds"] == 7 and values["seconds_of_400_steps"] == 407
    assert (values["loss_first"], values["loss_last_5"]) == (3.0, 2.0)


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_peer_is_one_line(name, monkeypatch):
    bench = importlib.import_module(f"bench.bench_{name}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    monkeypatch.setattr("sys.argv", ["bench"])
    arguments = {"harness": [2], "rows": [2, "cpu"]}.get(name, [])
    with pytest.raises(SystemExit) as refused:
        bench.main(*arguments)
    said = str(refused.value)
    assert said.endswith(f"python -m pip install {PEERS[name]}") and "\n" not in said
