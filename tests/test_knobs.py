"""A knob means one thing in every step: what 03 is told either reaches 02 and 04, or they have no use for
it.
"""

import ast
import importlib
import json
from pathlib import Path

import pytest
import torch

from common import models, training
from pipeline import knobs, results
from task3_tokenizer import embeddings

TASKS = sorted(path.name for path in results.ROOT.glob("task[0-9]_*"))
CHANGED = {
    "precision": "fp32",
    "compute": "fp32",
    "gradient_checkpointing": "on",
    "schedule": "linear",
    "rehearsal": "0.2",
    "init": "random",
}  # words and numbers of which only some are allowed


def config_class(task: str, step: str):
    """The knobs of a script; 02 has none of its own."""
    shared = importlib.import_module(f"{task}.task").Config
    return getattr(importlib.import_module(f"{task}.{step}"), "Config", shared)


def config(task: str, step: str, settings: dict):
    own, shared = config_class(task, step), importlib.import_module(f"{task}.task").PROFILES
    known = {name: value for name, value in settings.items() if name in own.__dataclass_fields__}
    profiles = getattr(importlib.import_module(f"{task}.{step}"), "PROFILES", {"cpu": {}})
    return knobs.configure(own, (shared, profiles), "cpu", known)


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
        ("schedule=cosin", "one of cosine"),
        ("rehearsal=2", "0 to 1"),
        ("lora_dropout=1.5", "0 to 1"),
        ("n_test=0", "1 or more"),
    ],
)
@pytest.mark.parametrize("step", ["01_data", "03_train"])  # 01 refuses what 03 would after minutes
def test_a_word_or_number_that_cannot_be_is_said_before_anything_is_imported(text, word, step):
    with pytest.raises(SystemExit, match=word):
        knobs.parse_arguments(["--set", text], results.ROOT / "task1_decoder" / f"{step}.py")


def test_first_values_of_rows_that_are_none_are_said_before_anything_is_imported():
    script = results.ROOT / "task3_tokenizer" / "01_data.py"
    for method in embeddings.INITS:
        assert knobs.parse_arguments(["--set", f"init={method}"], script).of_task == {"init": method}
    with pytest.raises(SystemExit, match="one of mean of pieces"):
        knobs.parse_arguments(["--set", "init=zeros"], script)
    # a knob of another task is none of this one's business
    assert knobs.parse_arguments(["--set", "rehearsal=0.2"], script).of_task == {}


@pytest.mark.parametrize("run", results.REFERENCE)
def test_own_data_never_replaces_a_reference_run(run):
    script = results.ROOT / "task1_decoder" / "01_data.py"
    with pytest.raises(SystemExit, match=f"RUN={run} is a reference run"):
        knobs.parse_arguments(["--run", run, "--data", "own.jsonl"], script)
    assert knobs.parse_arguments(["--run", run, "--data", "corpus"], script).run == run


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
            monkeypatch.setattr(script, "schedule", lambda *_: [])
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
                "rows": lambda self, split: [],
                "log": lambda self, **values: None,
            },
        )()
        (tmp_path / "stored.json").write_text("{}")
        with pytest.raises(Stop):
            script.main(run)
    assert asked["02_baseline"] == asked["03_train"] == asked["04_eval"]


# Knobs of 03 -> value -> where the library has it. A knob is in one of these tables or in SEEN_ELSEWHERE.
TRAINER = {
    "learning_rate": (0.123, "args.learning_rate"),
    "schedule": ("linear", "args.lr_scheduler_type.value"),
    "warmup_steps": (3, "args.warmup_steps"),
    "max_grad_norm": (0.7, "args.max_grad_norm"),
    "weight_decay": (0.02, "args.weight_decay"),
    "optimizer": ("adamw_torch", "args.optim.value"),
    "seed": (5, "args.seed"),
    "max_steps": (7, "args.max_steps"),
    "eval_every": (2, "args.eval_steps"),
    "log_every": (3, "args.logging_steps"),
    "lora_r": (3, "lora.r"),
    "lora_alpha": (9, "lora.lora_alpha"),
    "lora_dropout": (0.25, "lora.lora_dropout"),
}
REACHES = {
    "task1_decoder": TRAINER | {
        "batch_size": (6, "args.per_device_train_batch_size"),
        "eval_batch_size": (9, "args.per_device_eval_batch_size"),
        "gradient_checkpointing": ("on", "args.gradient_checkpointing"),
        "target_modules": ("q_proj,v_proj", "lora.target_modules"),
        "patience": (4, "patience"),
    },
    "task2_encoder": TRAINER | {
        "batch_size": (6, "args.per_device_train_batch_size"),
        "target_modules": ("query,value", "lora.target_modules"),
        "workers": (2, "args.dataloader_num_workers"),
        "scale": (7.5, "loss.scale"),
        "base_dropout": (0.375, "dropout"),
        "max_tokens": (48, "model.max_seq_length"),
    },
    "task3_tokenizer": {name: TRAINER[name] for name in TRAINER if name not in (
        "learning_rate", "warmup_steps", "optimizer", "max_steps", "eval_every", "weight_decay")} | {
        "warmup": (0.6, "args.warmup_steps"),
        "weight_decay": (0.02, "optimizers[0].defaults['weight_decay']"),
        "lr_rows_later": (0.01, "rates[0]"),
        "lr_matrices": (0.02, "rates[1]"),
        "lr_lora": (0.03, "rates[2]"),
    },
}
# What the library makes of such a value; 0.6 of five steps are three.
REACHED = {"on": True, "q_proj,v_proj": {"q_proj", "v_proj"}, "query,value": {"query", "value"}, 0.6: 3}
# Data, prompts and number formats: what they do is tested where it is done.
SEEN_ELSEWHERE = {
    "model", "data", "columns", "benchmark", "instruction", "precision", "double_quant", "compute",
    "max_prompt_tokens", "max_completion_tokens", "max_new_tokens", "n_benchmark", "n_general", "memory_gib",
    "rows_per_pass", "bucket", "within_package", "query_prompt", "document_prompt",
    "eval_batch_size", "terms", "n_uses", "n_texts", "init", "tied", "texts_a", "texts_b", "texts_c1",
    "texts_c2", "lr_rows", "batch_size", "distil_passes", "cuda_graphs", "liger", "rehearsal", "n_manners",
}
ROWS = [
    {"id": f"r{i}", "prompt": f"question {i}", "completion": f"answer {i}", "anchor": f"anchor {i}",
     "positive": f"positive {i}", "group": i, "package": "own", "term": f"t{i % 10}", "text": f" text {i}"}
    for i in range(20)
]
FOLDERS = dict.fromkeys(TASKS, "tiny_model_folder") | {"task2_encoder": "tiny_encoder_folder"}


def trainer_of(task: str, cfg, folder, monkeypatch) -> dict:
    """The arguments that the library's Trainer is made with, "lora" (PEFT's configuration), "patience",
    "dropout" of the base and "rates" of parameter groups.
    """
    script, seen = importlib.import_module(f"{task}.03_train"), {}

    def spy(**arguments):
        seen.update(arguments)
        raise Stop

    name = {
        "task1_decoder": "DevTrainer",
        "task2_encoder": "Trainer",
        "task3_tokenizer": "WindowTrainer",
    }[task]
    monkeypatch.setattr(script, name, spy)
    with pytest.raises(Stop):
        if task == "task3_tokenizer":
            arm = script.Arm("new", models.load_tokenizer(cfg.model), {}, [5, 6])
            stage = script.stages(cfg, cfg.batch_size)["c2"]
            script.train_stage(cfg, arm, stage, Path(cfg.model), folder, ROWS, 4, [], lambda **values: None)
        else:
            script.train(cfg, ROWS, ROWS[:4], folder, "", lambda **values: None)
    model = seen["model"].transformers_model if task == "task2_encoder" else seen["model"]
    seen["lora"] = model.peft_config["default"]
    for callback in seen["callbacks"]:
        seen["patience"] = getattr(callback, "early_stopping_patience", None) or seen.get("patience")
    if task == "task2_encoder":
        own = [name for name in dict(model.named_modules()) if "lora_" not in name]
        (seen["dropout"],) = {model.get_submodule(name).p for name in own
                              if isinstance(model.get_submodule(name), torch.nn.Dropout)}
    if task == "task3_tokenizer":
        seen["rates"] = [group["lr"] for group in seen["optimizers"][0].param_groups]
    return seen


@pytest.mark.parametrize("task", TASKS)
def test_every_knob_of_training_reaches_the_library(task, request, tmp_path, monkeypatch):
    """All at once, each with a value that is nobody's default."""
    folder = request.getfixturevalue(FOLDERS[task])
    reaches = REACHES[task]
    defaults = knobs_of_training(task)
    assert not defaults.keys() - reaches.keys() - SEEN_ELSEWHERE, "a new knob: say where it arrives"
    values = {name: value for name, (value, _) in reaches.items()}
    assert not [name for name, value in values.items() if defaults[name] == value]
    cfg = config_class(task, "03_train")(model=str(folder), compute="fp32", **values, **(
        {} if task == "task3_tokenizer" else {"precision": "fp32"}))
    seen = trainer_of(task, cfg, tmp_path, monkeypatch)
    for name, (value, place) in reaches.items():
        assert eval(place, {}, seen) == REACHED.get(value, value), name


@pytest.mark.parametrize("task", TASKS[:2])
def test_a_checkpoint_belongs_to_its_knobs_and_data(task, request, tmp_path, monkeypatch):
    """What 03 asks for when it looks for a checkpoint differs with any knob and with the data."""
    folder = request.getfixturevalue(FOLDERS[task])
    script, asked = importlib.import_module(f"{task}.03_train"), []

    def spy(folder, identity):
        asked.append(json.dumps(identity))
        raise Stop

    monkeypatch.setattr(script.training, "open_checkpoints", spy)
    for rate, data_hash in ((1e-3, "a"), (2e-3, "a"), (1e-3, "b")):
        cfg = script.Config(model=str(folder), precision="fp32", compute="fp32", learning_rate=rate,
                            max_steps=1, batch_size=4)
        with pytest.raises(Stop):
            script.train(cfg, ROWS, ROWS[:4], tmp_path, data_hash, None)
    assert len(set(asked)) == 3


def test_a_stage_of_task_3_belongs_to_its_knobs_data_and_arm(tmp_path, monkeypatch):
    script, asked = importlib.import_module("task3_tokenizer.03_train"), []
    monkeypatch.setattr(results, "cached", lambda path, given, job: asked.append(json.dumps(given)) or {})
    for rate, data_hash, arm in ((1e-3, "a", "new"), (2e-3, "a", "new"), (1e-3, "b", "new"),
                                 (1e-3, "a", "control")):
        cfg = script.Config(lr_rows=rate, texts_a=1, texts_b=1, texts_c1=1, texts_c2=1)
        rows = [{"term": term, "text": f"{term}{k}"} for term in "ab" for k in range(5)]
        list(script.train(cfg, script.Arm(arm, None, {}, []), tmp_path, rows, [], data_hash, None))
    assert len(asked) == len(set(asked)) == 4 * 5


def test_checkpoints_of_another_identity_are_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    assert training.open_checkpoints(folder, [{"lora_r": 4}, "data"]) is None
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6" / "trainer_state.json").write_text("{}")
    assert training.open_checkpoints(folder, [{"lora_r": 4}, "data"]) == str(folder / "checkpoint-6")
    assert training.open_checkpoints(folder, [{"lora_r": 8}, "data"]) is None
    assert not (folder / "checkpoint-6").exists()


@pytest.mark.parametrize("choice", [True, False])
def test_an_encoder_in_4_bits_is_nf4_with_the_scales_as_asked(tiny_encoder_folder, choice):
    task = importlib.import_module("task2_encoder.task")
    cfg = task.Config(model=str(tiny_encoder_folder), compute="fp32", double_quant=choice)
    state = task.load_encoder(cfg)[0].model.encoder.layer[0].intermediate.dense.weight.quant_state
    assert (state.nested, state.quant_type, state.dtype) == (choice, "nf4", torch.float32)
