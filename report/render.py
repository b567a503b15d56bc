"""Render report.md and its figures from results/ with the Jinja2 templates beside this file.

    python -m report.render          write what changed (twice gives identical bytes)
    python -m report.render check    exit 1 if the report is out of date, a result is stale, or a knob has
                                     no reason

The prose and the choice of tables are in the templates: report.md.j2 includes one file per task. What a
template prints goes through `printed`: a result row becomes "value [lo, hi]", a number is rounded, text is
escaped. A row that a template asks for and a run does not have stops the rendering with its name. Results of
the profile "smoke" are never read.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from common import results

ESCAPES = {character: f"&#{ord(character)};" for character in "&<>|*`["} | {"\n": "<br>", "  ": "&nbsp; "}
# verdict -> colour and marker: told apart on white paper, in grey and by colour-blind readers
VERDICTS = {"improved": ("#0b4f8a", "o"), "worse": ("#d9480f", "X"), "no difference shown": ("#868e96", "d"),
            None: ("#212529", "|")}
SERIES = (("#0b4f8a", "o", "-"), ("#e8590c", "s", "--"), ("#868e96", "d", ":"))  # colour, marker, line
STYLE = {"svg.hashsalt": "qlora", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "figure.facecolor": "white", "figure.constrained_layout.use": True,
         "lines.markersize": 4, "errorbar.capsize": 2, "legend.frameon": False, "legend.fontsize": 8}


# -- cells -----------------------------------------------------------------------------------------------

def number(value, digits: int = 3) -> str:
    """A number for people: three decimals, two significant digits below 0.01, a dash for a missing one."""
    if value is None:
        return "–"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.{digits}f}" if abs(value) >= 0.01 else f"{value:.2g}"


def p_value(p: float | None) -> Markup:
    return Markup("< 0.001") if p is not None and p < 0.001 else Markup("–" if p is None else f"{p:.3f}")


def printed(value) -> Markup:
    """What a template prints for a row, a number or text of the data."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, dict):
        bounds = f" [{number(value['lo'])}, {number(value['hi'])}]" if value.get("lo") is not None else ""
        return printed(value["value"]) + Markup(bounds)
    if not isinstance(value, str | bool | jinja2.Undefined):
        return Markup(number(value))
    text = str(value)
    for old, new in ESCAPES.items():
        text = text.replace(old, new)
    return Markup(text)


def code(text: str, limit: int = 300) -> Markup:
    """Text of the data or of a model as code, cut at `limit` characters."""
    cut = str(printed(text if len(text) <= limit else text[:limit] + " ..."))
    return Markup(f"<code>{cut.replace('_', '&#95;')}</code>")


def label(row: dict) -> str:
    """What tables call the metric of a row."""
    return row.get("label", row["metric"].replace("_", " "))


# -- results ---------------------------------------------------------------------------------------------

def load_all(root: Path) -> dict[tuple[str, str, str], dict]:
    """{(run, task, step): result} of all runs but smoke ones, "cpu" first."""
    paths = sorted(root.glob("*/*/*.json"), key=lambda path: (path.parts[-3] != "cpu", path))
    found = {(path.parts[-3], path.parts[-2], path.stem): results.read(path) for path in paths}
    return {key: result for key, result in found.items() if result["profile"] != "smoke"}


def rows(result: dict, **wanted) -> list[dict]:
    """The rows of a result that have these values, in stored order."""
    return [row for row in result["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def row(result: dict, **wanted):
    """The first of `rows`; if there is none, a value that stops the rendering when it is printed."""
    missing = jinja2.StrictUndefined(f"{result['run']}/{result['task']}/{result['step']} has no row {wanted}")
    return next(iter(rows(result, **wanted)), missing)


def like(result: dict, given: dict, **changes):
    """The row that differs from the given one in `changes` only."""
    keys = ("table", "name", "metric", "stage", "kind", "seed", "texts")
    return row(result, **{key: given[key] for key in keys if key in given} | changes)


class Report:
    """What the templates call, over the results of one folder; figures are collected while they render."""

    def __init__(self, root: Path):
        self.root, self.found, self.figures = root, load_all(root), {}

    def step(self, run: str, task: str, step: str):
        missing = jinja2.StrictUndefined(f"{run}/{task}/{step} is missing")
        return self.found.get((run, task, step), missing)

    def shown(self, task: str, step: str, others: bool = True) -> list[dict]:
        """Results of a step: first of the run that a section shows (the first that reached 04), then of the
        other runs of the profile "gpu"."""
        evaluated = [key[0] for key in self.found if key[1:] == (task, "04_eval")]
        of_step = {key[0]: result for key, result in self.found.items() if key[1:] == (task, step)}
        first = [of_step.pop(run) for run in evaluated[:1] if run in of_step]
        return first + [result for result in of_step.values() if others and result["profile"] == "gpu"]

    def stale(self, key: tuple[str, str, str]) -> str | None:
        """Why a result is stale, or None."""
        return results.changed(self.root.joinpath(*key).with_suffix(".json"))

    def choices(self, task: str) -> list[tuple]:
        """(script, [(knob, default, what the shown run used, reason)]) of the scripts of a task."""
        found = []
        for path in sorted((results.ROOT / task).glob("*.py"), key=lambda path: (path.stem != "task", path)):
            run = self.shown(task, path.stem if path.stem != "task" else "04_eval", others=False)
            used = {name: repr(value) for result in run for name, value in result["config"].items()}
            knobs = [(name, knob["value"], used.get(name, knob["value"]), knob["reason"])
                     for name, knob in results.knobs(path).items()]
            found += [(results.shown(path), knobs)] if knobs else []
        return found

    # -- figures: white ground, so that they can be read on dark pages ------------------------------------

    def forest(self, result: dict, name: str, title: str, unit: str, lines: dict[str, dict]) -> Markup:
        """An interval per line {label: row of a difference}; its colour is the row's verdict."""
        figure = Figure(figsize=(6.4, 0.28 * len(lines) + 0.9))
        axes = figure.add_subplot()
        axes.axvline(0, color="#868e96", lw=1)
        axes.set_yticks(range(len(lines)), list(lines)[::-1])
        places = list(enumerate(list(lines.values())[::-1]))
        for verdict, (colour, marker) in VERDICTS.items():
            own = [(y, row) for y, row in places if row.get("verdict") == verdict]
            if own:
                axes.errorbar([row["value"] for _, row in own], [y for y, _ in own], fmt=marker, color=colour,
                              xerr=bars([row for _, row in own]), label=verdict)
        axes.set_xlabel(unit)
        axes.legend()
        return self.keep(figure, result, name, title)

    def curve(self, result: dict, name: str, title: str, x: str, panels: dict[str, dict]) -> Markup:
        """A panel per {label of its y axis: {series: rows, or a number for a level}} over the key `x`."""
        figure = Figure(figsize=(3.6 * max(len(panels), 1.6), 2.8))
        for place, (unit, series) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), place + 1)
            for (legend, points), (colour, marker, line) in zip(series.items(), SERIES):
                if isinstance(points, float):
                    axes.axhline(points, color=colour, ls=line, label=legend)
                elif points:
                    axes.errorbar([row[x] for row in points], [row["value"] for row in points], color=colour,
                                  marker=marker, ls=line, yerr=bars(points), label=legend)
            axes.set(xlabel=x.replace("_", " "), ylabel=unit)
            axes.legend()
        return self.keep(figure, result, name, title)

    def keep(self, figure: Figure, result: dict, name: str, title: str) -> Markup:
        """Collect a figure as SVG with fixed ids and without a date; returns the Markdown that shows it."""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        path = self.root / result["run"] / result["task"] / f"{name}.svg"
        self.figures[path] = re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.MULTILINE)
        return Markup(f"![{title}]({path.relative_to(self.root.parent).as_posix()})")


def bars(points: list[dict]) -> list[list[float]] | None:
    """How far the intervals of rows reach below and above their values, if all have one."""
    if all("lo" in row for row in points):
        return [[max(0, row["value"] - row["lo"]) for row in points],
                [max(0, row["hi"] - row["value"]) for row in points]]
    return None


# -- putting it together ---------------------------------------------------------------------------------

def render(root: Path) -> dict[Path, str]:
    """{path: text} of report.md and its figures, from the results in the folder `root`.

    jinja2.UndefinedError names a row or key that a template needs and a result does not have.
    """
    report = Report(root)
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                             finalize=printed, undefined=jinja2.StrictUndefined, trim_blocks=True,
                             lstrip_blocks=True)
    env.globals |= {"rows": rows, "row": row, "like": like, "label": label, "found": report.found}
    env.globals |= {name: getattr(report, name)
                    for name in ("step", "shown", "stale", "choices", "forest", "curve")}
    env.filters |= {"number": number, "p": p_value, "code": code}
    with matplotlib.rc_context(STYLE):
        text = env.get_template("report.md.j2").render()
    return {root.parent / "report.md": re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", **report.figures}


def outdated(root: Path) -> dict[Path, str]:
    """The part of `render` that differs from the files there are."""
    return {path: text for path, text in render(root).items()
            if not path.exists() or path.read_text(encoding="utf-8") != text}


def problems(root: Path) -> list[str]:
    """What `check` complains about, a line each."""
    found = []
    for path in sorted(results.ROOT.glob("task*/*.py")):
        found += [f"{results.shown(path)}: knob {name!r} has no reason in a comment above it"
                  for name, knob in results.knobs(path).items() if not knob["reason"]]
    report = Report(root)
    for key, result in report.found.items():
        path = root.joinpath(*key).with_suffix(".json")
        if reason := report.stale(key):
            remedy = results.command(path, result["profile"], result["settings"])
            found.append(f"{results.shown(path)} is stale ({reason}): {remedy}")
    return found + [f"{results.shown(path)} is out of date: make report" for path in outdated(root)]


def main(argv: list[str]) -> int:
    root = results.ROOT / "results"
    if argv == ["check"]:
        wrong = problems(root)
        print("\n".join(wrong) or "report, results and reasons are current")
        return bool(wrong)
    for path, text in outdated(root).items():
        results.write_atomic(path, text)
        print(f"wrote {results.shown(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
