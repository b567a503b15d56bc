"""Knobs: the fields of a script's `Config`, the reasons above them, and the command line that sets them."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import math
import re
from pathlib import Path

from pipeline import results

PROFILES = ("smoke", "cpu", "gpu")
CHOICES = {"compute": ("auto", "bf16", "fp16", "fp32"), "precision": ("nf4", "bf16", "fp16", "fp32"),
           "gradient_checkpointing": ("auto", "on", "off"),
           "schedule": ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"),
           "init": ("mean of pieces", "random", "vocabulary mean", "last and first piece", "weighted pieces",
                    "distilled")}  # embeddings.INITS, which imports torch
AT_LEAST_1 = {"lora_r", "lora_alpha", "batch_size", "eval_batch_size", "eval_every", "max_steps", "log_every",
              "max_prompt_tokens", "max_completion_tokens", "max_new_tokens", "max_tokens", "bucket",
              "n_test", "n_dev", "n_pool"}
AT_MOST_1 = {"rehearsal", "lora_dropout", "base_dropout"}


def read(path: Path) -> dict[str, dict[str, str]]:
    """{name: {"value" (source text), "reason" (the comment above it)}} of the class `Config` in a script."""
    lines = path.read_text(encoding="utf-8").splitlines()

    def above(field):
        start = field.lineno - 1
        while re.match(r"\s*# (?!--)", lines[start - 1]):  # "# -- the optimiser --" is a heading
            start -= 1
        return " ".join(line.strip("# ") for line in lines[start:field.lineno - 1])

    return {field.target.id: {"value": ast.unparse(field.value), "reason": above(field)}
            for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "Config"
            for field in node.body if isinstance(field, ast.AnnAssign)}


def value_of(name: str, text: str, default):
    """The value that `text` gives to a knob, in the type of its default. SystemExit if it cannot be one."""
    kind, least, most = type(default), int(name in AT_LEAST_1), 1 if name in AT_MOST_1 else math.inf
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        number = kind in (int, float)
        if number and not (least <= value <= most and value < math.inf):
            raise ValueError
        if value not in CHOICES.get(name, [value]):
            raise ValueError
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: f"a whole number, {least} or more",
                  float: f"a number, 0 {'to 1' if most == 1 else 'or more'}",
                  str: f"one of {', '.join(CHOICES.get(name, []))}"}[kind]
        raise SystemExit(f"knob {name}={text!r}: expected {wanted}") from None
    return value


def parse_arguments(argv: list[str], script: Path, doc: str = "") -> argparse.Namespace:
    """The arguments that every step takes, checked against the script's source, before anything is imported.

    `settings` keeps the knobs of this step and `of_task` those of all its steps, so that 01 refuses what 03
    would: one SET serves `make`, so a knob of another task is no error, and `asked` keeps all for the command
    that a message proposes.
    """
    parser = argparse.ArgumentParser(prog=results.shown(script), description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu", help="smoke, cpu (default) or gpu")
    parser.add_argument("--run", help="name of the results folder (default: mine; smoke for that profile)")
    parser.add_argument("--model", help="an embedded model, a model folder or a hub id owner/name[@revision]")
    parser.add_argument("--data", help="corpus, a JSONL, JSON, CSV, TSV, Parquet file, folder of texts, or "
                        "a hub id owner/name[:configuration[:split]][@revision]")
    parser.add_argument("--columns", help="your names of columns: 'prompt=question completion=answer'")
    parser.add_argument("--benchmark", help="task 1: a task definition of lm-eval (YAML), scored beside ours")
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE", help="knobs of any script")
    args = parser.parse_args(argv)
    settings = {}
    for text in args.set:
        name, equals, settings[name] = text.partition("=")
        if not equals:
            raise SystemExit(f"--set {text!r}: expected KNOB=VALUE; a value with blanks in quotes: "
                             "SET=\"'knob=two words'\"")
    settings.update({name: getattr(args, name) for name in results.SOURCES if getattr(args, name, None)})

    everywhere = {path: read(path) for path in script.parent.parent.glob("task*/*.py")}
    names = set().union(*everywhere.values())
    for name in settings.keys() - names:
        near = difflib.get_close_matches(name, names, 1) or sorted(names)
        raise SystemExit(f"unknown knob {name!r}: did you mean {' or '.join(map(repr, near))}?")
    args.run = args.run or results.default_run(args.profile)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", args.run):
        raise SystemExit(f"RUN={args.run!r} is a folder name: letters, digits, '.', '_' and '-' only")
    if args.profile not in PROFILES:
        raise SystemExit(f"unknown profile {args.profile!r}: choose one of {', '.join(PROFILES)}")
    declared = everywhere.get(script.with_name("task.py"), {}) | everywhere[script]
    args.asked = dict(sorted(settings.items()))
    args.settings = {name: value for name, value in args.asked.items() if name in declared}
    args.of_task = {}
    for knobs in (knobs for path, knobs in everywhere.items() if path.parent == script.parent):
        for name in args.asked.keys() & knobs.keys():
            args.of_task[name] = args.asked[name]
            with contextlib.suppress(ValueError):  # a default that is no literal is text
                value_of(name, args.asked[name], ast.literal_eval(knobs[name]["value"]))
    if args.run in results.REFERENCE and args.asked.get("data", "corpus") != "corpus":
        raise SystemExit(f"RUN={args.run} is a reference run of this repository; own data needs another")
    return args


def configure(config_class, profiles: tuple[dict, ...], profile: str, settings: dict):
    """The step's Config: defaults, then the profile's overrides (shared ones first), then settings."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    overrides = {name: value for part in profiles for name, value in part[profile].items()}
    typed = {name: value_of(name, text, defaults[name]) for name, text in settings.items()}
    for name, value in (overrides | typed).items():
        print(f"  {name}={value!r} ({'command line' if name in typed else f'profile {profile}'})")
    return config_class(**overrides | typed)


def config_of(config_class, stored: dict, **changes):
    """A Config with the knobs of a stored result, except for `changes`: what an ablation trains with."""
    known = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in {**stored, **changes}.items() if name in known})


def chosen(only: str, possible: list[str]) -> list[str]:
    """The rows of ablations named in `only`, separated by ";", or all. SystemExit for a name that is none."""
    names = [name.strip() for name in only.split(";")] if only else possible
    if unknown := [name for name in names if name not in possible]:
        raise SystemExit(f"only={only!r}: no row {unknown[0]!r}; rows: {'; '.join(possible)}")
    return names
