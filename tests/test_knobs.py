"""A knob means one thing in every step: what 03 is told either reaches 02 and 04, or they have no use for
it.
"""

import ast
import importlib

import pytest

from common import models, results

TASKS = sorted(path.name for path in results.ROOT.glob("task[0-9]_*"))
CHANGED = {
    "precision": "fp32",
    "compute": "fp32",
    "gradient_checkpointing": "on",
}  # words of which only some are allowed


def config_class(task: str, step: str):
    """The knobs of a script; 02 has none of its own."""
    shared = importlib.import_module(f"{task}.task").Config
    return getattr(importlib.import_module(f"{task}.{step}"), "Config", shared)


def config(task: str, step: str, settings: dict):
    own, shared = config_class(task, step), importlib.import_module(f"{task}.task").PROFILES
    known = {name: value for name, value in settings.items() if name in own.__dataclass_fields__}
    profiles = getattr(importlib.import_module(f"{task}.{step}"), "PROFILES", {"cpu": {}})
    return results.configure(own, (shared, profiles), "cpu", known)


def knobs_of_training(task: str) -> dict:
    return {
        name: field.default
        for name, field in config_class(task, "03_train").__dataclass_fields__.items()
    }


def another(name: str, value) -> str:
    if isinstance(value, bool):
        return str(not value)
    return CHANGED.get(name) or (f"{value}x" if isinstance(value, str) else str(value + 1))


def names_in(task: str, steps: tuple[str, ...]) -> set[str]:
    """Every knob that the steps, and what of this repository they import, read from `cfg`, and every
    argument of common/models.py.
    """
    waiting, seen, names = [f"{task}/{step}.py" for step in steps], set(), set()
    while waiting:
        path = results.ROOT / waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [
                    f"{node.module.replace('.', '/')}.py",
                    *(f"{node.module}/{alias.name}.py" for alias in node.names),
                ]
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("cfg"):
                names.add(node.attr)
            if isinstance(node, ast.arg) and path.name == "models.py":
                names.add(node.arg)
    return names


@pytest.mark.parametrize("task", TASKS)
def test_a_changed_knob_of_training_reaches_the_steps_around_it(task):
    for name, value in knobs_of_training(task).items():
        settings = {name: another(name, value)}
        trained = getattr(config(task, "03_train", settings), name)
        assert trained != value, name
        for step in ("02_baseline", "04_eval"):
            other = config(task, step, settings)
            if hasattr(other, name):
                assert getattr(other, name) == trained, f"{step} has its own {name}"


@pytest.mark.parametrize("task", TASKS)
def test_a_default_has_the_type_that_is_written_beside_it(task):
    """The type of a default is what --set accepts: memory_gib = 0 would refuse 15.5."""
    for path in sorted((results.ROOT / task).glob("[0-9a]*.py")):
        for name, field in config_class(task, path.stem).__dataclass_fields__.items():
            assert type(field.default).__name__ == getattr(field.type, "__name__", field.type), (
                f"{path.name}: {name}"
            )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("compute=fp17", "one of auto, bf16"),
        ("gradient_checkpointing=yes", "one of auto, on, off"),
        ("lora_r=0", "1 or more"),
        ("precision=NF4", "one of nf4"),
        ("learning_rate=nan", "a number"),
    ],
)
def test_a_word_or_number_that_cannot_be_is_said_before_anything_is_imported(text, word):
    with pytest.raises(SystemExit, match=word):
        results.parse_arguments(["--set", text], results.ROOT / "task1_decoder" / "03_train.py")


@pytest.mark.parametrize("task", TASKS)
def test_how_the_base_is_loaded_is_shared(task):
    """Whatever decides what a model computes is a knob of all steps: none of these belongs to 03 alone, and
    none has a default of its own in the loaders, where a step could forget it.
    """
    shared = importlib.import_module(f"{task}.task").Config.__dataclass_fields__
    own = {name for name in knobs_of_training(task) if name not in shared}
    loading = {
        "model",
        "precision",
        "double_quant",
        "compute",
        "instruction",
        "max_tokens",
        "query_prompt",
        "document_prompt",
        "max_prompt_tokens",
        "max_completion_tokens",
        "max_new_tokens",
        "eval_batch_size",
        "seed",
    }
    assert not own & loading
    if task == "task1_decoder":  # a knob of 03 that 02 and 04 name is one they should have had
        assert not own & names_in(task, ("02_baseline", "04_eval"))


class Stop(Exception):
    """Raised by the spy once it has seen how a model is asked for."""


@pytest.mark.parametrize("name", ["precision", "double_quant", "compute", "model"])
def test_all_steps_of_task_1_load_the_same_base(name, monkeypatch, tmp_path):
    """A spy in the place of the loader sees the same arguments from 02, 03 and 04."""
    asked = {}

    def spy(*arguments, **more):
        asked[step] = (arguments, more)
        raise Stop

    monkeypatch.setattr(models, "load_decoder", spy)
    settings = {name: another(name, knobs_of_training("task1_decoder")[name])}
    for step in ("02_baseline", "03_train", "04_eval"):
        script = importlib.import_module(f"task1_decoder.{step}")
        monkeypatch.setattr(script.models, "load_tokenizer", lambda name: None)
        monkeypatch.setattr(results, "read_rows", lambda path: [])
        if step == "03_train":
            monkeypatch.setattr(script.task, "encode", lambda *arguments: [])
            monkeypatch.setattr(script, "schedule", lambda examples, cfg: [])
            with pytest.raises(Stop):
                script.train(config("task1_decoder", step, settings), [], [], tmp_path, "", None)
            continue
        run = type(
            "Run",
            (),
            {
                "cfg": config("task1_decoder", step, settings),
                "load": lambda self, step: {},
                "folder": tmp_path,
                "artifact": lambda self, step, name: tmp_path / "stored.json",
                "log": lambda self, **values: None,
            },
        )()
        (tmp_path / "stored.json").write_text("{}")
        with pytest.raises(Stop):
            script.main(run)
    assert asked["02_baseline"] == asked["03_train"] == asked["04_eval"]
