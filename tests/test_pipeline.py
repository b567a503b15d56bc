"""The numbered scripts as a user runs them: resume after a kill, own data, and one line for every user
error.
"""

import json
import signal
import subprocess
import sys
import time

import pytest

from common import training
from pipeline import results
from tests.conftest import environment, one_line, step
from tests.decoders import write_rows
from tests.hub_server import Hub

TRAIN = ["--set", "max_steps=24", "eval_every=6", "batch_size=4", "lora_dropout=0.1"]


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return ["--model", str(tiny_model_folder)]


def train_rows(root, run):
    return json.loads((root / "results" / run / "task1_decoder" / "03_train.json").read_text())["rows"]


@pytest.mark.all
def test_killed_and_resumed_training_equals_uninterrupted(repo, model):
    for run in ("whole", "killed"):
        assert step(repo, "01_data", "--run", run, *model).returncode == 0
    assert (done := step(repo, "03_train", "--run", "whole", *model, *TRAIN)).returncode == 0, done.stderr

    folder = repo / "runs" / "killed" / "task1_decoder"
    command = [
        sys.executable,
        "task1_decoder/03_train.py",
        "--profile",
        "smoke",
        "--run",
        "killed",
        *model,
        *TRAIN,
    ]
    child = subprocess.Popen(
        command, cwd=repo, env=environment(repo), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not (folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").exists():
        assert child.poll() is None and time.time() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (
        not (repo / "results" / "killed" / "task1_decoder" / "03_train.json").exists()
        and not (folder / "adapter").exists()
    )

    assert (done := step(repo, "03_train", "--run", "killed", *model, *TRAIN)).returncode == 0, done.stderr
    whole, resumed = (
        [
            (r["metric"], r["step"], pytest.approx(r["value"], abs=1e-4))
            for r in train_rows(repo, run)
            if r["table"] == "curve"
        ]
        for run in ("whole", "killed")
    )
    assert whole == [(m, s, v.expected) for m, s, v in resumed] and len(whole) > 10


@pytest.mark.all
def test_a_run_killed_after_its_last_step_goes_on(repo, model):
    """All steps are made and nothing is stored yet: the repeated command makes no step, and stores the same
    adapter and curve.
    """
    run, folder = "last", repo / "runs" / "last" / "task1_decoder"
    assert step(repo, "01_data", "--run", run, *model).returncode == 0
    script = repo / "task1_decoder" / "03_train.py"
    whole = script.read_text()
    try:
        script.write_text(
            whole.replace("    training.remove(checkpoints)\n", "")
        )  # dies before it removes them
        assert step(repo, "03_train", "--run", run, *model, *TRAIN).returncode == 0
    finally:
        script.write_text(whole)
    first, weights = train_rows(repo, run), (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    (repo / "results" / run / "task1_decoder" / "03_train.json").unlink()
    (folder / "adapter" / "adapter_model.safetensors").unlink()  # as if killed while it was written
    done = step(repo, "03_train", "--run", run, *model, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 24" in done.stdout
    assert [r for r in train_rows(repo, run) if r["table"] == "curve"] == [
        r for r in first if r["table"] == "curve"
    ]
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert not (folder / "checkpoints").exists()


@pytest.mark.all
def test_checkpoints_of_other_knobs_are_not_resumed(repo, model):
    assert step(repo, "01_data", "--run", "others", *model).returncode == 0
    folder = repo / "runs" / "others" / "task1_decoder" / "checkpoints"
    (folder / "checkpoint-6").mkdir(parents=True)
    (folder / "identity").write_text("another run")
    done = step(repo, "03_train", "--run", "others", *model, *TRAIN)
    assert done.returncode == 0 and "resuming" not in done.stdout, done.stderr


@pytest.mark.all
def test_equal_trainings_leave_equal_bytes(repo, model):
    """In processes of their own: those that `step` forks share a hash seed, and so the order of sets."""
    assert step(repo, "01_data", "--run", "bytes", *model).returncode == 0
    command = [sys.executable, "task1_decoder/03_train.py", "--profile", "smoke", "--run", "bytes", *model,
               "--set", "max_steps=2", "eval_every=2"]
    adapter, saved = repo / "runs" / "bytes" / "task1_decoder" / "adapter", []
    for seed in ("1", "2"):
        done = subprocess.run(command, cwd=repo, env=environment(repo) | {"PYTHONHASHSEED": seed},
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        saved.append({file.name: file.read_bytes() for file in adapter.iterdir()})
    assert "adapter_config.json" in saved[0] and [n for n in saved[0] if saved[0][n] != saved[1].get(n)] == []


@pytest.mark.all
def test_what_an_embedded_model_leaves_names_no_folder_of_this_machine(repo):
    for name in ("01_data", "03_train"):
        assert (
            done := step(repo, name, "--run", "named", "--set", "max_steps=2", "eval_every=2")
        ).returncode == 0, done.stderr[-2000:]
    adapter = repo / "runs" / "named" / "task1_decoder" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("embedded-135m", None)
    for file in adapter.iterdir():
        assert file.suffix == ".safetensors" or not any(
            str(place) in file.read_text(encoding="utf-8") for place in (repo, results.ROOT)
        ), file


@pytest.mark.all
def test_a_model_of_a_hub_runs_from_an_empty_cache_and_offline(repo, tiny_model_folder, tmp_path):
    """01 loads a tokenizer only, which used to leave a partial snapshot that 02 took for whole. Adapter and
    results name hub id and commit.
    """
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl")
    with Hub(models={"someone/tiny": tiny_model_folder}, datasets={"someone/rows": tmp_path / "rows"}) as url:
        environ = environment(repo) | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache")}
        arguments = [
            "--profile",
            "smoke",
            "--run",
            "hub",
            "--model",
            "someone/tiny",
            "--data",
            "someone/rows",
            "--set",
            "instruction=",
            "max_steps=2",
            "eval_every=2",
        ]

        def run(name, **more):
            return subprocess.run(
                [sys.executable, f"task1_decoder/{name}.py", *arguments],
                cwd=repo,
                env=environ | more,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )

        for name in ("01_data", "02_baseline"):
            assert (done := run(name)).returncode == 0, done.stderr[-2000:]
    for name in ("03_train", "04_eval"):  # the hub is gone
        assert (done := run(name, HF_HUB_OFFLINE="1")).returncode == 0, done.stderr[-2000:]
    stored = [
        json.loads((repo / "results" / "hub" / "task1_decoder" / f"{name}.json").read_text())
        for name in ("01_data", "04_eval")
    ]
    commit = stored[0]["inputs"]["hub:model:someone/tiny"]
    assert len(stored[0]["inputs"]["hub:dataset:someone/rows"]) == 40
    assert len(commit) == 40 and stored[1]["inputs"]["hub:model:someone/tiny"] == commit
    config = json.loads(
        (repo / "runs" / "hub" / "task1_decoder" / "adapter" / "adapter_config.json").read_text()
    )
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", commit)
    for folder in ("adapter", "merged"):
        for file in (repo / "runs" / "hub" / "task1_decoder" / folder).iterdir():
            assert file.suffix == ".safetensors" or str(tmp_path) not in file.read_text(encoding="utf-8"), (
                file
            )


OWN = [
    *("--run", "own", "--data", "own.jsonl", "--columns", "messages=chat", "--benchmark", "mine/task.yaml"),
    *("--set", "max_steps=2", "eval_every=2"),
]


def test_own_chats_and_a_benchmark_run_through_all_four_steps(quick, model):
    words = ["river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin"]
    texts = [[f"{words[(i * k) % 10]}{i}" for k in range(1, 13)] for i in range(80)]
    chats = [
        [
            {"role": "system", "content": f"Talk of {text[0]}."},
            *({"role": "user", "content": " ".join(text[:2])}, {"role": "assistant", "content": text[2]}),
            *({"role": "user", "content": text[3]}, {"role": "assistant", "content": " ".join(text[4:])}),
        ]
        for text in texts
    ]
    (quick / "own.jsonl").write_text("".join(json.dumps({"chat": chat}) + "\n" for chat in chats))
    items = [{"q": text[0], "a": text[1:5], "right": i % 4} for i, text in enumerate(texts)]
    (quick / "mine").mkdir()
    (quick / "mine" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (quick / "mine" / "task.yaml").write_text(
        "task: rivers\noutput_type: multiple_choice\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: items.jsonl}}\ntest_split: test\n"
        "doc_to_text: '{{q}}:'\ndoc_to_choice: '{{a}}'\ndoc_to_target: right\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    for name in ("01_data", "02_baseline", "03_train", "04_eval"):
        assert (done := step(quick, name, *model, *OWN)).returncode == 0, f"{name}: {done.stderr[-2000:]}"
    assert "repeated=0" in step(quick, "01_data", *model, *OWN).stdout
    stored = {
        name: json.loads((quick / "results" / "own" / "task1_decoder" / f"{name}.json").read_text())
        for name in ("01_data", "02_baseline", "04_eval")
    }
    rows = stored["04_eval"]["rows"]
    assert {"base", "tuned", "delta"} <= {r["name"] for r in rows if r["table"] == "heldout"}
    assert all({"lo", "hi", "p", "n"} <= set(r) for r in rows if r["name"] == "delta")
    (mine,) = (r for r in rows if (r["table"], r["name"]) == ("own rivers", "delta"))
    assert mine["metric"] == "acc" and mine["better"] == "higher" and mine["n"] == 4
    assert "file:own.jsonl" in stored["01_data"]["inputs"]
    for name in ("02_baseline", "04_eval"):
        assert {"file:mine/task.yaml", "file:mine/items.jsonl"} <= set(stored[name]["inputs"])


def test_an_ablation_row_is_a_training_with_one_thing_changed(quick, model):
    assert (done := step(quick, "ablations", *model, *OWN, "only=bf16 LoRA;rank 4")).returncode == 0, (
        done.stderr[-2000:]
    )
    rows = json.loads((quick / "results" / "own" / "task1_decoder" / "ablations.json").read_text())["rows"]
    size = {r["name"]: r["value"] for r in rows if r["metric"] == "trainable_parameters"}
    assert size["bf16 LoRA"] == size["as in 03"] == 4 * size["rank 4"]
    assert {r["name"] for r in rows if r["table"] == "ablation minus 03"} == {"bf16 LoRA", "rank 4"}
    one_line(step(quick, "ablations", *model, *OWN, "only=nothing"), "no row 'nothing'")


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr(training, "PROCESSES", 2)
    assert training.per_process(8) == 4
    with pytest.raises(SystemExit, match="batch_size=7"):
        training.per_process(7)


def test_own_prompts_without_an_instruction_are_asked_for_one(repo, model):
    rows = "".join(json.dumps({"prompt": f"Question {i}?", "completion": str(i)}) + "\n" for i in range(80))
    (repo / "asked.jsonl").write_text(rows)
    one_line(step(repo, "01_data", "--run", "x", "--data", str(repo / "asked.jsonl"), *model), "instruction")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("01_data", ["--profile", "big"], ["unknown profile 'big'"]),
        ("03_train", ["--set", "lora_rank=8"], ["unknown knob 'lora_rank'", "lora_r"]),
        (
            "01_data",
            ["--run", "y", "--data", "nowhere.csv", "--set", "instruction="],
            ["DATA=nowhere.csv", "No such file"],
        ),
        (
            "02_baseline",
            ["--run", "never"],
            ["results/never/task1_decoder/01_data.json is missing", "make task1"],
        ),
        ("01_data", ["--run", "z", "--model", "some/model"], ["MODEL=some/model", "embedded-135m"]),
        ("01_data", ["--run", "z", "--data", "some/data", "--set", "instruction="], ["DATA=some/data"]),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(repo, name, arguments, words):
    started = time.time()
    one_line(step(repo, name, *arguments), *words)
    assert time.time() - started < 60
    assert not any((repo / place / run).exists() for place in ("results", "runs") for run in ("y", "z"))


def test_steps_that_disagree_on_a_shared_knob_are_refused(quick, model):
    done = step(quick, "02_baseline", *model, *OWN, "max_prompt_tokens=50")
    one_line(done, "max_prompt_tokens=80", "50")


def test_interrupt_is_one_line(quick, model):
    child = subprocess.Popen(
        [sys.executable, "task1_decoder/02_baseline.py", "--profile", "smoke", *model, *OWN],
        cwd=quick,
        env=environment(quick),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a job in the background ignores it
    assert "02_baseline" in child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode != 0 and "interrupted" in err and "Traceback" not in err


def test_help_tells_what_is_read_and_written(repo):
    text = step(repo, "03_train", "--help").stdout
    assert "Reads" in text and "Writes" in text and "Needs" in text
