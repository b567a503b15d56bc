"""What a step refuses or promises before its slow imports: a model folder or data that cannot work, minutes.

Neither torch nor transformers is loaded here, so that a mistake in MODEL= or DATA= is answered in a second.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jinja2
import safetensors

from pipeline import results
from sources import hub


def given_sources(script: Path, settings: dict[str, str]) -> None:
    """SystemExit in one line if a source in `settings` cannot work. A model on a hub is left to the download.

    Data is looked at by 01, the first step to read it.
    """
    if script.stem == "01_data" and settings.keys() & {*results.SOURCES} - {"model"}:
        from sources import data
        data.check(script.parent.name, settings)
    model = settings.get("model", "")
    folder = Path(model).expanduser()
    if model and not folder.is_dir() and not model.startswith("embedded-") and not hub.is_id(model):
        raise SystemExit(f"MODEL={model}: no such folder, and not a hub id (owner/name); `make help` lists "
                         "the embedded models")
    wanted = settings.get("target_modules", "")
    expression(wanted)  # which names with commas are as well
    if model and folder.is_dir():
        complete(folder)
        compile_templates(folder)
        layers = [name.removesuffix(".weight") for name, shape in tensors(folder).items() if len(shape) == 2]
        if layers and is_list(wanted):  # the names in an expression may be longer in the model
            target_modules(wanted, layers, f"MODEL={folder}")


def complete(folder: Path) -> None:
    """SystemExit unless a model folder has a configuration and weights, which are no pickle."""
    hub.refuse_pickles([str(file.relative_to(folder)) for file in folder.rglob("*.*")], f"MODEL={folder}")
    needed = {"config.json": ("config.json", "modules.json"),
              "weights (*.safetensors)": ("**/*.safetensors",)}
    for what, patterns in needed.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise SystemExit(f"MODEL={folder}: no {what} there; expected what save_pretrained writes")


def compile_templates(folder: Path) -> None:
    """SystemExit if the chat template, a file or an entry of the tokenizer's configuration, is no Jinja."""
    try:
        found = [file.read_text(encoding="utf-8") for file in folder.glob("chat_template.jinja")]
        found += [json.loads(file.read_text(encoding="utf-8")).get("chat_template")
                  for file in folder.glob("tokenizer_config.json")]
        for template in found:
            if isinstance(template, str):  # without transformers' own tag, which only marks the answers
                plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
                jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except (jinja2.TemplateSyntaxError, ValueError) as err:
        raise SystemExit(f"MODEL={folder}: chat template or tokenizer_config.json: {err}") from None


def tensors(folder: Path) -> dict[str, list[int]]:
    """{name: shape} of the weights in a folder's safetensors files, of which only the heads are read.
    SystemExit for a file that is damaged or cut short.
    """
    shapes = {}
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safetensors.safe_open(file, "np") as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in weights.offset_keys()}
        except safetensors.SafetensorError as err:
            raise SystemExit(f"MODEL={folder}: {file.name} is damaged or cut short ({err})") from None
    return shapes


def target_modules(wanted: str, layers: list[str], where: str) -> list[str] | str:
    """The knob `target_modules` as PEFT takes it, checked against the names of a model's linear `layers`.

    "all-linear" becomes the sorted endings of all the names, names separated by commas become a list, and a
    regular expression stays one. SystemExit with the endings if a name or the expression matches no layer.
    """
    endings = sorted({re.search(r"[^.]+(\.\d+)*$", layer)[0] for layer in layers})  # "mlp.0" rather than "0"
    if wanted == "all-linear" and endings:
        return endings
    names = wanted.split(",") if is_list(wanted) else []
    missing = [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if not names and not any(expression(wanted).fullmatch(layer) for layer in layers):
        missing = [wanted]
    if missing:
        raise SystemExit(f"target_modules: no layer named {', '.join(missing)} in {where}; it has "
                         f"{', '.join(endings) or 'none'}")
    return names or wanted


def expression(wanted: str) -> re.Pattern:
    """The knob `target_modules` as a regular expression. SystemExit if it is none."""
    try:
        return re.compile(wanted)
    except re.error as err:
        raise SystemExit(f"target_modules={wanted!r}: neither names with commas nor a regular expression "
                         f"({err})") from None


def is_list(wanted: str) -> bool:
    """Whether the knob `target_modules` is names of layers, rather than "all-linear" or an expression."""
    return re.fullmatch(r"[\w.,]+", wanted) is not None


def minutes(script: Path, args) -> str | None:
    """About how long the step takes, and from 01 on the task; None if nothing is known.

    It is the time of the committed run of the profile. What follows 01 is scaled by the size of the weights,
    and training by its steps and batch as well.
    """
    folder, own = results.ROOT / "results" / args.profile / script.parent.name, args.of_task
    try:
        found = {path.stem: results.read(path) for path in sorted(folder.glob("0*.json"))}
    except SystemExit:  # not as a step wrote it
        return None
    if len(found) < 4 or script.stem not in found:
        return None
    weights, seconds, model = 1.0, {}, own.get("model")
    if model != found["01_data"]["settings"].get("model"):
        size = sum(map(math.prod, tensors(Path(model or "-")).values()))
        weights = size / next(row["value"] for row in found["02_baseline"]["rows"]
                              if row["metric"] == "parameters")
    if not weights:  # a model of a hub
        return None
    for step, stored in found.items():
        seconds[step] = stored["cost"]["seconds"] * (weights if step != "01_data" else 1)
        for name in ("max_steps", "batch_size") if "max_steps" in stored["config"] else ():
            seconds[step] *= float(own.get(name, stored["config"][name])) / stored["config"][name]
    said = f"about {max(1, round(seconds[script.stem] / 60))} min"
    if script.stem == "01_data":
        said += f", all steps {max(1, round(sum(seconds.values()) / 60))}"
    return f"{script.stem}: {said}, if this machine is like the reference's ({stored['env']['device']})"
