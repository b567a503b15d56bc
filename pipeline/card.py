"""The card of what a run leaves, README.md beside the weights: base, licence, figures, how to open it."""

from __future__ import annotations

from pathlib import Path

import jinja2
from huggingface_hub import ModelCard, metadata_load

from sources import pretrained


def write(run, trained: dict, rows: list[dict], *folders: str) -> None:
    """Write README.md into `folders` of runs/<run>/<task>: card.md.j2 with 03's result and 04's `rows`.

    ValueError if it were no card that hubs can read.
    """
    card = Path(pretrained.resolve(trained["config"]["model"])) / "README.md"
    said = metadata_load(card) if card.exists() else {}
    source = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    template = jinja2.Template(source, trim_blocks=True, lstrip_blocks=True)
    for folder in folders:
        text = template.render(run=run, folder=folder, trained=trained, measured=rows, said=said or {},
                               named=pretrained.public_name)
        ModelCard(text).save(run.folder / folder / "README.md")
