"""What report.md says about the same training on several accelerators: loss curves laid over each other, and tokens per second."""

from __future__ import annotations

import json
from pathlib import Path

from common.report import Found, Rows, draw, number, table


def pairs(found: Found, task: str) -> list[tuple[Rows, Rows, dict, dict]]:
    """(rows of one process, rows of several, their results) for trainings of one configuration that differ in nothing else."""
    trained: dict[str, dict[int, dict]] = {}
    for (_, t, step), result in found.items():
        processes = Rows(result).one(table="training", metric="processes")
        if (t, step) == (task, "03_train") and processes:
            trained.setdefault(json.dumps(result["config"], sort_keys=True), {})[processes["value"]] = result
    return [(Rows(of[1]), Rows(of[n]), of[1], of[n]) for of in trained.values() if 1 in of for n in sorted(of) if n > 1]


def several(task: str):
    """Block: the same training by one process and by several, from the losses they logged and the time they took."""
    def block(found: Found) -> str:
        body, figures = [], []
        for one, many, first, second in pairs(found, task):
            losses = [{r["step"]: r["value"] for r in rows.all(table="curve", metric="loss")} for rows in (one, many)]
            apart = [abs(losses[0][step] - losses[1][step]) for step in losses[0] if step in losses[1]]
            speed = [result["cost"]["tokens_per_second"] for result in (first, second)]  # none for a run that was resumed
            times = number(speed[1] / speed[0], 2) if all(speed) else "–"
            body.append([many.one(table="training", metric="processes")["value"], second["env"]["device"], number(speed[0], 0),
                         number(speed[1], 0), times, number(sum(apart) / len(apart), 4), number(max(apart), 4), len(apart)])
            figures.append(f"![loss curves](results/{second['run']}/{task}/processes.svg)")
        head = ["processes", "device", "tokens/s, one", "tokens/s, several", "times", "mean difference in loss", "largest", "readings"]
        return "\n\n".join([table(head, body), *figures]) if body else "not run: `make " + task.split("_")[0] + " PROFILE=gpu NPROC=2 RUN=gpu2`"
    return block


def figure(found: Found, task: str) -> dict[Path, str]:
    """{path: SVG} of the loss curves of one process and of several, beside the results of the latter."""
    drawn = {}
    for one, many, _, second in pairs(found, task):
        def plot(_, canvas, one=one, many=many):
            axes = canvas.add_subplot()
            for what, label, style in ((one, "one process", dict(color="#9aa5b1", lw=3)),
                                       (many, f"{many.one(table='training', metric='processes')['value']} processes", dict(color="#c2410c", lw=1))):
                points = what.all(table="curve", metric="loss")
                axes.plot([p["step"] for p in points], [p["value"] for p in points], label=label, **style)
            axes.set(xlabel="optimiser step", ylabel="training loss")
            axes.legend(frameon=False)
        drawn |= draw({(second["run"], task, "03_train"): second}, task, (6.4, 3.2), {"processes": ("03_train", plot)})
    return drawn
