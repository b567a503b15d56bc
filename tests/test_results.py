"""Storage and freshness: atomic writes, hashes that ignore comments, staleness that travels downstream."""

import ast
import dataclasses
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import checks, knobs, results, runner
from tests.conftest import environment

TOY = '''"""Doc."""
from dataclasses import dataclass
from pipeline import results, runner
from task9_toy import task

@dataclass(frozen=True)
class Config:
    # a reason
    scale_{step}: int = {scale}

PROFILES = {{"smoke": dict(), "cpu": dict(), "gpu": dict()}}

def main(run):
    {load}
    results.write_atomic(run.folder / "{step}.txt", "made")
    row = {{"table": "toy", "name": "m", "metric": "x", "value": run.cfg.scale_{step}}}
    run.save([row], artifacts=["{step}.txt"])

if __name__ == "__main__":
    runner.start(main, Config, PROFILES)
'''


@pytest.fixture
def toy(tmp_path):
    """A repository of one task with three steps, 03 reading 02 reading 01; runs each and returns its root."""
    for folder in ("pipeline", "sources"):
        shutil.copytree(results.ROOT / folder, tmp_path / folder)
    task = tmp_path / "task9_toy"
    task.mkdir()
    (task / "__init__.py").touch()
    (task / "task.py").write_text("SHARED = 1\n")
    for i, (step, load) in enumerate(
        (("01_a", "pass"), ("02_b", 'run.load("01_a")'), ("03_c", 'run.load("02_b")'))
    ):
        (task / f"{step}.py").write_text(TOY.format(scale=i, load=load, step=step))
        assert run(tmp_path, step).returncode == 0
    return tmp_path


def run(root, step, *args):
    return subprocess.run(
        [sys.executable, f"task9_toy/{step}.py", *args],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        check=False,
    )


def fresh(root, step, *args):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.fresh", f"results/mine/task9_toy/{step}.json", *args],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode == 0, done.stdout


def states(root):
    return [fresh(root, step)[0] for step in ("01_a", "02_b", "03_c")]


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_comment_and_docstring_edits_stay_fresh(toy):
    edit(toy / "task9_toy" / "02_b.py", "# a reason", "# a much better reason")
    edit(toy / "task9_toy" / "02_b.py", '"""Doc."""', '"""A longer doc."""')
    assert states(toy) == [True, True, True]


def test_knob_edit_makes_that_step_and_those_after_stale(toy):
    edit(toy / "task9_toy" / "02_b.py", "scale_02_b: int = 1", "scale_02_b: int = 7")
    assert states(toy) == [True, False, False]
    assert "task9_toy/02_b.py changed" in fresh(toy, "02_b")[1]
    assert run(toy, "02_b").returncode == 0
    assert states(toy) == [True, True, False]


def test_shared_module_edit_makes_every_step_stale(toy):
    edit(toy / "task9_toy" / "task.py", "SHARED = 1", "SHARED = 2")
    assert states(toy) == [False, False, False]


def test_file_times_do_not_matter(toy):
    for path in toy.rglob("*.py"):
        os.utime(path, (1, 1))
    assert states(toy) == [True, True, True]


def test_settings_are_part_of_freshness(toy):
    assert not fresh(toy, "02_b", "--set", "scale_02_b=5")[0]
    assert run(toy, "02_b", "--set", "scale_02_b=5").returncode == 0
    assert fresh(toy, "02_b", "--set", "scale_02_b=5")[0]


def test_the_number_format_that_auto_took_may_be_named(toy):
    for step in ("01_a", "02_b"):
        script = toy / "task9_toy" / f"{step}.py"
        edit(script, "class Config:\n", 'class Config:\n    # a reason\n    compute: str = "auto"\n')
        edit(script, "def main(run):\n", 'def main(run):\n    runner.FACTS["compute"] = "bf16"\n')
    assert run(toy, "01_a").returncode == 0
    assert run(toy, "02_b", "--set", "compute=bf16").returncode == 0
    assert "01_a.json was made with compute='auto'" in run(toy, "02_b", "--set", "compute=fp32").stderr


def test_a_clone_without_runs_is_fresh_until_a_later_step_must_run(toy):
    (toy / "runs" / "mine" / "task9_toy" / "01_a.txt").unlink()
    assert states(toy) == [True, True, True]
    edit(toy / "task9_toy" / "03_c.py", "scale_03_c: int = 2", "scale_03_c: int = 9")
    assert states(toy) == [False, True, False]
    assert "is missing and 03_c may need it" in fresh(toy, "01_a")[1]


def test_a_clone_without_runs_makes_again_what_stale_ablations_need(toy):
    (toy / "task9_toy" / "ablations.py").write_text(
        TOY.format(scale=4, load='run.load("03_c")', step="ablations")
    )
    assert run(toy, "ablations").returncode == 0
    (toy / "runs" / "mine" / "task9_toy" / "01_a.txt").unlink()
    assert states(toy) == [True, True, True]
    edit(toy / "task9_toy" / "ablations.py", "scale_ablations: int = 4", "scale_ablations: int = 9")
    assert states(toy) == [False, True, True]
    assert "is missing and ablations may need it" in fresh(toy, "01_a")[1]


def test_half_a_result_is_stale_and_refused_as_input(toy):
    path = toy / "results" / "mine" / "task9_toy" / "01_a.json"
    path.write_text(path.read_text()[:200])
    assert states(toy) == [False, False, False]
    done = run(toy, "02_b")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "01_a.json is cut short" in done.stderr and "make task9" in done.stderr
    done = run(toy, "02_b", "--set", "scale_01_a=5")  # the remedy keeps the knobs of other steps
    assert 'make task9 SET="scale_01_a=5"' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "scael_01_a=3"], ["unknown knob 'scael_01_a'", "did you mean 'scale_01_a'"]),
        (["--set", "scale_01_a=much"], ["scale_01_a='much'", "expected a whole number"]),
        (["--set", "scale_01_a=-3"], ["scale_01_a='-3'", "0 or more"]),
        (["--set", "scale_01_a"], ["expected KNOB=VALUE"]),
        (["--profile", "cpuu"], ["unknown profile 'cpuu'", "smoke, cpu, gpu"]),
        (["--run", "../x"], ["RUN='../x'"]),
    ],
)
def test_mistyped_arguments_are_one_line(toy, arguments, words):
    done = run(toy, "01_a", *arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_knobs_of_another_task_are_no_error_and_change_nothing(toy):
    """One SET serves `make`: what only another task knows is left to it."""
    (toy / "task8_other").mkdir()
    (toy / "task8_other" / "01_x.py").write_text(TOY.format(scale=1, load="pass", step="01_x"))
    assert fresh(toy, "01_a", "--set", "scale_01_x=5")[0]


def test_two_processes_never_write_one_folder(toy):
    """The second is refused in one line that names the first, and may write as soon as that is killed."""
    edit(
        toy / "task9_toy" / "01_a.py",
        "    pass",
        "    import time; print('working', flush=True); time.sleep(60)",
    )
    first = subprocess.Popen(
        [sys.executable, "task9_toy/01_a.py"],
        cwd=toy,
        env=environment(toy),
        stdout=subprocess.PIPE,
        text=True,
    )
    while "working" not in first.stdout.readline():
        assert first.poll() is None
    done = run(toy, "02_b")
    assert (
        done.returncode != 0
        and "Traceback" not in done.stderr
        and f"process {first.pid}" in done.stderr
        and "RUN=" in done.stderr
    )
    assert run(toy, "03_c", "--run", "other").stderr.count("is missing") == 1  # another run is free
    first.kill()
    first.wait()
    assert run(toy, "02_b").returncode == 0


STEPS = ("01_a", "02_b", "03_c")


def share_knobs(toy, **knobs: str) -> None:
    """Give the three steps of the toy these knobs, by a Config in its task.py."""
    fields = "".join(f"\n    # a reason\n    {name}: str = {value!r}" for name, value in knobs.items())
    edit(toy / "task9_toy" / "task.py", "SHARED = 1", "SHARED = 1\n\nfrom dataclasses import dataclass\n\n"
         f"@dataclass(frozen=True)\nclass Config:{fields}")
    for step in STEPS:
        edit(toy / "task9_toy" / f"{step}.py", "class Config:", "class Config(task.Config):")


def test_a_moved_hub_revision_is_stale_and_refused_as_input(toy, tmp_path, monkeypatch):
    """The commit used is part of a result; a machine without the repository keeps its results."""
    cache = tmp_path / "cache" / "models--owner--name" / "refs"
    cache.mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (cache / "main").write_text("a" * 40)
    share_knobs(toy, model="owner/name")
    for step in STEPS:
        assert run(toy, step).returncode == 0
    stored = json.loads((toy / "results" / "mine" / "task9_toy" / "01_a.json").read_text())
    assert stored["inputs"]["hub:model:owner/name"] == "a" * 40
    (cache / "main").write_text("b" * 40)
    assert "owner/name is at commit bbbbbbbbbbbb, was aaaaaaaaaaaa" in fresh(toy, "01_a")[1]
    assert "owner/name@bbbbbbbbbbbb" in run(toy, "02_b").stderr
    (cache / "main").unlink()
    assert states(toy) == [True, True, True]


def test_the_remedy_repeats_the_arguments():
    path = results.ROOT / "results" / "mine" / "task1_decoder" / "01_data.json"
    said = results.command(
        path, "gpu", {"model": "owner/name", "data": "my rows.csv", "lora_r": "8", "instruction": "Say it."}
    )
    arguments = """MODEL=owner/name DATA='my rows.csv' SET="lora_r=8 'instruction=Say it.'\""""
    assert said == f"make task1 PROFILE=gpu {arguments}"
    reference = path.parents[2] / "cpu" / "task1_decoder" / "01_data.json"
    assert results.command(reference, "cpu", {}) == "make task1 RUN=cpu"


@pytest.mark.parametrize(
    ("arguments", "run_name"),
    [
        ([], "mine"),
        (["PROFILE=gpu"], "mine"),
        (["PROFILE=smoke"], "smoke"),
        (["MODEL=a/b"], "mine"),
        (["DATA=x.csv"], "mine"),
        (["SET=lora_r=8"], "mine"),
        (["RUN=r", "DATA=x"], "r"),
    ],
)
def test_nothing_writes_into_the_reference_results_by_itself(arguments, run_name):
    said = subprocess.run(
        ["make", "-n", "task1", "PY=true", *arguments],
        cwd=results.ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert f" results/{run_name}/task1_decoder/01_data.json " in said and f"--run {run_name} " in said + " "


def test_a_path_with_a_blank_stays_one_argument():
    said = subprocess.run(
        ["make", "-n", "task3", "PY=true", "TERMS=my words.csv", "DATA=my texts"],
        cwd=results.ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = shlex.split(next(line for line in said.splitlines() if "task3_tokenizer/01_data.json" in line))
    assert "terms=my words.csv" in words and "my texts" in words


def test_a_run_name_with_a_blank_is_one_line():
    done = subprocess.run(
        ["make", "task1", "RUN=my run"], cwd=results.ROOT, capture_output=True, text=True, check=False
    )
    assert (
        done.returncode != 0
        and 'RUN="my run" is a folder name' in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


def test_a_script_imports_from_the_clone_it_lies_in(toy, tmp_path):
    """Another clone on the path, as an installed one would be, is not used and not written to."""
    other = tmp_path / "other"
    (other / "pipeline").mkdir(parents=True)
    (other / "pipeline" / "__init__.py").write_text("raise ImportError('the other clone')")
    source = (results.ROOT / "task1_decoder" / "03_train.py").read_text()
    (toy / "task9_toy" / "01_a.py").write_text(
        source[: source.index("from pipeline import")] + (toy / "task9_toy" / "01_a.py").read_text()
    )
    done = subprocess.run(
        [sys.executable, str(toy / "task9_toy" / "01_a.py")],
        cwd=tmp_path,
        env=environment(other),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_script_puts_its_own_clone_first():
    for script in [
        *results.ROOT.glob("task*/0*.py"),
        *results.ROOT.glob("task*/ablations.py"),
        *results.ROOT.glob("bench/bench_*.py"),
    ]:
        text = script.read_text(encoding="utf-8")
        assert text.index("sys.path.insert(0, str(Path(__file__).resolve().parent.parent))") < text.index(
            "from pipeline"
        ), script


def test_wrong_arguments_stop_make_before_the_step(toy):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pipeline.fresh",
            "results/mine/task9_toy/01_a.json",
            "--set",
            "nothing=1",
        ],
        cwd=toy,
        env=environment(toy),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "unknown knob 'nothing'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "make it writable")]
)
def test_a_full_or_read_only_disk_is_one_line(toy, number, remedy):
    failure = f"    raise OSError({number}, {os.strerror(number)!r}, 'runs/x')"
    edit(toy / "task9_toy" / "01_a.py", "    pass", failure)
    done = run(toy, "01_a")
    assert done.returncode != 0 and remedy in done.stderr and "Traceback" not in done.stderr
    assert "01_a: " in done.stderr and "'runs/x'" in done.stderr


def test_what_cannot_be_written_whole_leaves_the_old_file(tmp_path):
    results.write_atomic(tmp_path / "x.json", "old")
    with pytest.raises(UnicodeEncodeError):
        results.write_atomic(tmp_path / "x.json", "new \ud800")
    assert (tmp_path / "x.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_reason_of_a_knob_is_the_comment_above_it(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "class Config:\n    # -- heading --\n    # above, first line\n    # second line\n    a: int = 1\n"
        "    b: int = 3\n"
    )
    assert knobs.read(path) == {
        "a": {"value": "1", "reason": "above, first line second line"},
        "b": {"value": "3", "reason": ""},
    }


def test_a_config_of_a_stored_result_is_a_real_one():
    config = dataclasses.make_dataclass("Config", [("a", int, 1), ("b", str, "x")], frozen=True)
    assert knobs.config_of(config, {"a": 5, "b": "y", "gone": 0}, b="z") == config(a=5, b="z")


def test_nan_is_never_stored(toy):
    edit(toy / "task9_toy" / "01_a.py", '"value": run.cfg.scale_01_a', '"value": float("nan")')
    assert run(toy, "01_a").returncode != 0
    assert json.loads(result_of(toy, "01_a").read_text())["rows"][0]["value"] == 0


# ------------------------------------------------------------------------------ edited, copied, out of step

def result_of(root, step, run_name="mine"):
    return root / "results" / run_name / "task9_toy" / f"{step}.json"


def test_an_edited_result_is_stale_and_refused_as_input(toy):
    edit(result_of(toy, "01_a"), '"value": 0', '"value": 7')
    assert "01_a.json was edited" in fresh(toy, "01_a")[1]
    done = run(toy, "02_b")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "01_a.json was edited" in done.stderr and "make task9" in done.stderr


def test_a_result_without_a_checksum_counts_as_edited(toy):
    stored = json.loads(result_of(toy, "01_a").read_text())
    del stored["checksum"]
    result_of(toy, "01_a").write_text(json.dumps(stored))
    assert "was edited" in fresh(toy, "01_a")[1]


def test_a_copied_folder_is_no_run(toy):
    shutil.copytree(toy / "results" / "mine", toy / "results" / "backup")
    done = run(toy, "02_b", "--run", "backup")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "backup/task9_toy/01_a.json was edited or copied from another run" in done.stderr


def test_what_a_step_left_is_verified_before_it_is_read(toy):
    """New results beside an old runs/, or a file edited by hand: refused, and made again once deleted."""
    edit(toy / "task9_toy" / "02_b.py", 'run.load("01_a")', 'run.artifact("01_a", "01_a.txt")')
    assert run(toy, "02_b").returncode == 0
    artifact = toy / "runs" / "mine" / "task9_toy" / "01_a.txt"
    artifact.write_text("of another training")
    done = run(toy, "02_b")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for word in ("runs/mine/task9_toy/01_a.txt is not what 01_a left there", "delete it, then make task9"):
        assert word in done.stderr
    artifact.unlink()
    assert run(toy, "01_a").returncode == 0 and run(toy, "02_b").returncode == 0


def test_large_weights_are_hashed_in_parts_that_another_training_changes(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * (33 << 20))
    whole, parts = results.sha256(file), results.sha256(file, whole=1)
    with file.open("r+b") as stream:
        stream.seek(5 << 20)  # outside the parts that are read
        stream.write(b"b")
    assert results.sha256(file) != whole and results.sha256(file, whole=1) == parts
    file.write_bytes(b"c" * (33 << 20))
    assert results.sha256(file, whole=1) != parts
    file.write_bytes(b"a" * ((33 << 20) - 1))
    assert results.sha256(file, whole=1) != parts


# --------------------------------------------------------------------------------------------- own sources

@pytest.fixture
def with_data(toy):
    """The toy whose first step reads a file, and has a model."""
    share_knobs(toy, data="corpus", model="embedded")
    edit(toy / "task9_toy" / "01_a.py", "    pass", "    from pathlib import Path\n"
         "    if run.cfg.data != 'corpus': run.track(Path(run.cfg.data))")
    return toy


def test_a_path_outside_is_stored_by_its_name_and_compared_by_its_content(with_data, tmp_path_factory):
    place = tmp_path_factory.mktemp("private")
    file, model = place / "rows.csv", place / "my-model"
    file.write_text("a,b")
    model.mkdir()
    (model / "config.json").write_text("{}")
    asked = ["--run", "own", "--data", str(file), "--model", str(model)]
    for step in ("01_a", "02_b"):
        done = run(with_data, step, *asked)
        assert done.returncode == 0, done.stderr
    text = "".join(path.read_text() for path in (with_data / "results" / "own").rglob("*.json"))
    assert str(place) not in text and place.name not in text and str(Path.home()) not in text
    stored = json.loads(result_of(with_data, "01_a", "own").read_text())
    assert stored["settings"] == {"data": "rows.csv", "model": "my-model"} == {
        name: stored["config"][name] for name in ("data", "model")}
    assert {"outside:rows.csv", "outside:my-model"} <= stored["inputs"].keys()

    def state(step, arguments):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.fresh", str(result_of(with_data, step, "own")),
             *arguments], cwd=with_data, env=environment(with_data), capture_output=True, text=True,
            check=False)
        return done.stdout
    assert "fresh" in state("02_b", asked)
    (model / "config.json").write_text("{'other': 1}")
    assert "outside:my-model changed" in state("02_b", asked)
    (model / "config.json").write_text("{}")
    file.write_text("a,c")
    assert "outside:rows.csv changed" in state("01_a", asked)
    assert "01_a is stale (outside:rows.csv changed)" in state("02_b", asked)
    code = (f"from pipeline import fresh; from pathlib import Path; "
            f"print(fresh.changed(Path({str(result_of(with_data, '01_a', 'own'))!r})))")
    done = subprocess.run([sys.executable, "-c", code], cwd=with_data, env=environment(with_data),
                          capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"  # without arguments, as in make check, it cannot be found
    file.unlink()
    (place / "renamed.csv").write_text("a,b")
    assert "asked for" in state("01_a", ["--run", "own", "--data", str(place / "renamed.csv")])


def test_sources_as_anything_saved_may_name_them(tmp_path, monkeypatch):
    (tmp_path / "rows.csv").touch()
    monkeypatch.chdir(tmp_path)
    assert results.public(str(tmp_path / "rows.csv")) == results.public("rows.csv") == "rows.csv"
    assert results.public(str(results.ROOT / "task3_tokenizer" / "terms.csv")) == "task3_tokenizer/terms.csv"
    for name in ("owner/name@main", "corpus", "embedded-135m", "found", ""):
        assert results.public(name) == name


def test_nothing_from_data_moves_the_cursor_of_a_terminal(capsys):
    runner.Run.log(None, word="\x1b[2J\u202etxt\u200b\r\x00", next="a\nb", plain="déjà vu, ёж, 漢字")
    said = capsys.readouterr().out
    assert said == ("word=\\u001b[2J\\u202etxt\\u200b\\u000d\\u0000 next=a\\nb plain=déjà vu, ёж, 漢字\n")


# ---------------------------------------------------------------------------------- before the slow imports

def refused(model, script="03_train.py", **settings):
    with pytest.raises(SystemExit) as stop:
        checks.given_sources(results.ROOT / "task1_decoder" / script, {"model": str(model), **settings})
    said = str(stop.value)
    assert "\n" not in said and str(model) in said
    return said


@pytest.mark.parametrize("wrong", ["/nowhere/model", "./model", "~/model", "embeded-135m"])
def test_what_is_no_model_is_named_before_the_slow_imports(wrong):
    assert "no such folder, and not a hub id" in refused(wrong)
    for possible in ("embedded-135m", "embedded-2b", "owner/name", "owner/name@main"):
        checks.given_sources(results.ROOT / "task1_decoder" / "03_train.py", {"model": possible})


def test_a_model_folder_is_checked_before_the_slow_imports(tiny_model_folder, tmp_path):
    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    script = results.ROOT / "task1_decoder" / "03_train.py"
    for wanted in ("all-linear", "q_proj,mlp.up_proj", "layers.1.mlp.down_proj", r".*(q|k)_proj"):
        checks.given_sources(script, {"model": str(model), "target_modules": wanted})
    said = refused(model, target_modules="q_proj,query")
    assert "no layer named query" in said and "k_proj" in said and "up_proj" in said
    with pytest.raises(SystemExit, match="neither names with commas nor a regular expression"):
        checks.given_sources(script, {"target_modules": "[("})
    (model / "chat_template.jinja").write_text("{% for m in messages %}{% generation %}x{% endgeneration %}"
                                               "{% endfor %}")
    checks.given_sources(script, {"model": str(model)})
    (model / "chat_template.jinja").write_text("{% for m in messages %}")
    assert "chat template" in refused(model)
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ oops"}))
    assert "chat template" in refused(model)
    (model / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in refused(model)
    (model / "tokenizer_config.json").unlink()
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "model.safetensors is damaged or cut short" in refused(model)
    weights.unlink()
    (model / "checkpoint-1").mkdir()
    (model / "checkpoint-1" / "pytorch_model.bin").touch()  # nobody reads it
    assert "no weights" in refused(model)


def test_the_minutes_are_those_of_the_reference_scaled_by_weights_and_steps(tiny_model_folder, monkeypatch):
    script = results.ROOT / "task1_decoder" / "03_train.py"

    def said(step="03_train", profile="cpu", **settings):
        return checks.minutes(script.with_stem(step), SimpleNamespace(profile=profile, of_task=settings))
    seconds = [json.loads(path.read_text())["cost"]["seconds"] for path in sorted(
        (results.ROOT / "results" / "cpu" / "task1_decoder").glob("0*.json"))]
    assert f"03_train: about {round(seconds[2] / 60)} min, if this machine is like" in said()
    assert f"all steps {round(sum(seconds) / 60)}, if" in said("01_data") and "2 cores" in said("01_data")
    assert f"about {round(4 * seconds[2] / 60)} min" in said(max_steps="150", batch_size="16")
    assert "about 1 min" in said(model=str(tiny_model_folder))
    monkeypatch.setattr(results, "read", lambda path: sys.exit(f"{path} was edited"))
    assert said() is None  # a damaged reference stops nobody
    monkeypatch.undo()
    for unknown in ({"model": "owner/name"}, {"profile": "smoke-test"}, {"step": "ablations"}):
        assert said(**unknown) is None


def test_checks_load_neither_torch_nor_transformers():
    code = ("import sys; from pipeline import checks, fresh, results, runner; "
            "print(sorted({'torch', 'transformers', 'numpy', 'pandas'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, env=environment(results.ROOT),
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scripts_check_their_arguments_above_every_other_import():
    scripts = [path for path in results.ROOT.glob("task*/*.py") if "check_arguments(" in path.read_text()]
    assert {path.stem for path in scripts} == {"01_data", "02_baseline", "03_train", "04_eval", "ablations"}
    for script in scripts:
        imported = set()
        for node in ast.parse(script.read_text(encoding="utf-8")).body:
            if "check_arguments(" in ast.unparse(node):
                break
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {getattr(node, "module", None) or node.names[0].name}
        assert imported <= {"__future__", "sys", "pathlib", "pipeline"}, script
