"""Render the report, the READMEs, a page per run and task, and their figures from results/ with Jinja2.

    python -m report.render               write what changed (twice gives identical bytes)
    python -m report.render RUN[/TASK]    the pages of one run, or of one of its tasks
    python -m report.render RUN OTHER     two runs side by side: results/RUN+OTHER/TASK/README.md
    python -m report.render summary RUN   a line per task of a run beside the reference run of its profile
    python -m report.render check         exit 1 if something is out of date, a result is stale or edited,
                                          a knob has no reason, or the prose breaks a rule of `prose_problems`

The prose is in en/ and ru/, where files of one name are translations of each other; numbers.j2 gives names to
the numbers that it mentions; page.md.j2 and pair.md.j2 serve all tasks, details1.md.j2 and so on one each.
What a template prints goes through `printed`: a result row becomes "value [lo, hi]", a number is rounded,
text is escaped. A row that a template asks for and a run does not have stops the rendering with its name.
Results of the profile "smoke" never get into the report.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import sys
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline import fresh, knobs, results

# what Markdown, HTML, links that are found without brackets, and formulas are made of
ESCAPES = {character: f"&#{ord(character)};" for character in "&<>|*`[~$\\"}
ESCAPES |= {"://": "&#58;//", "www.": "www&#46;", "\n": "<br>", "  ": "&nbsp; "}
# verdict -> colour and marker: told apart on white paper, in grey and by colour-blind readers
VERDICTS = {"improved": ("#0b4f8a", "o"), "worse": ("#d9480f", "X"), "no difference shown": ("#868e96", "d"),
            None: ("#212529", "|")}
SERIES = (("#0b4f8a", "o", "-"), ("#e8590c", "s", "--"), ("#868e96", "d", ":"))  # colour, marker, line
DOCUMENTS = {"report.md": "report.md.j2", "report.ru.md": "report.ru.md.j2", "README.md": "en/readme.md.j2",
             "README.ru.md": "ru/readme.md.j2"}
MOST_BYTES = {"report.md": 60_000, "report.ru.md": 25_000}
# Figures that prose may have: years, names of models, formats, tasks and versions, the level of intervals,
# @k, items of the assignment with their points.
FIGURES = (r"\b(19|20)\d\d\b|[^\W\d_][\w.-]*\d[\w.-]*|\b\d[\d.]*[BMБМ]\b|\b\d+(-| )(bits?|бит\w*)\b"
           r"|\b95 %|@\d+|^\| \d\.\d [^|]*\|[^|]*\||^\d+\. |^#+ .*$"
           r"|\b([Tt]asks?|[Зз]адач\w*) \d( and \d| и \d)?"
           r"|\b(Python|transformers|Qwen|Gemma|macOS) \d[\d.]*((-| and | и )[\d.]+)?")
STYLE = {"svg.hashsalt": "qlora", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "figure.facecolor": "white", "figure.constrained_layout.use": True,
         "lines.markersize": 4, "errorbar.capsize": 2, "legend.frameon": False, "legend.fontsize": 8}


# -- cells -----------------------------------------------------------------------------------------------

def number(value, digits: int = 3) -> str:
    """A number for people: three decimals, two significant digits below 0.01, a dash for a missing one."""
    if value is None:
        return "–"
    if value == int(value):
        shown = f"{int(value):,}"
    else:
        shown = f"{value:,.{digits}f}" if abs(value) >= 0.01 else f"{value:.2g}"
    return re.sub(r"^-", "\u2212", shown)


def signed(value) -> Markup:
    """A difference: a number or a row with its interval, with a sign."""
    row = value if isinstance(value, dict) else {"value": value}
    shown = [f"{row[key]:+.3f}".replace("-", "\u2212") for key in ("value", "lo", "hi")
             if row.get(key) is not None]
    return Markup(shown[0] + (f" [{', '.join(shown[1:])}]" if shown[1:] else ""))


def clustered(row: dict) -> Markup:
    """The interval of a difference if whole clusters of items are drawn."""
    return Markup(f"[{signed(row['cluster_lo'])}, {signed(row['cluster_hi'])}]")


def percent(value: float, digits: int = 0) -> Markup:
    return Markup(f"{100 * value:.{digits}f} %")


def p_value(row: dict) -> Markup:
    """The p of a row, after Holm's correction where it has one."""
    p = row.get("p_holm", row.get("p"))
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
    text = results.visible(str(value).replace("\r\n", "\n").expandtabs(4))
    for old, new in ESCAPES.items():
        text = text.replace(old, new)
    return Markup(re.sub(r"\b_+|_+\b", lambda found: "&#95;" * len(found[0]), text))


def code(text: str, limit: int = 300) -> Markup:
    """Text of the data or of a model as code, cut at `limit` characters."""
    return Markup(f"<code>{printed(text if len(text) <= limit else text[:limit] + ' ...')}</code>")


def short(verdict: str) -> str:
    """A verdict as tables of report.md say it, in which most are of this kind."""
    return {"no difference shown": "not shown"}.get(verdict, verdict)


def asked(found: dict, run: str, task: str) -> dict[str, str]:
    """The settings with which the four steps of a run were made: each keeps those of its own knobs."""
    return {name: value for (own, of, step), result in found.items() if (own, of) == (run, task)
            and step in STEPS for name, value in result["settings"].items()}


def label(row: dict) -> str:
    """What tables call the metric of a row."""
    return row.get("label", row["metric"].replace("_", " "))


# -- results ---------------------------------------------------------------------------------------------

def load_all(root: Path, run: str = "*", task: str = "*") -> dict[tuple[str, str, str], dict]:
    """{(run, task, step): result} of all runs and tasks or of one, "cpu" first."""
    paths = sorted(root.glob(f"{run}/{task}/*.json"), key=lambda path: (path.parts[-3] != "cpu", path))
    return {path.with_suffix("").parts[-3:]: results.read(path) for path in paths}


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


def fastest(result: dict, size: int, peer: bool = False) -> dict:
    """Of a bench's rows with `size` rows a batch, the fastest of ours or that of the best peer."""
    return max((row for row in result["rows"] if row["rows"] == size and row["peer"] == peer
                and "ratio" in row), key=lambda row: row["ratio"])


def knobs_of(task: str = "task*") -> dict[str, dict]:
    """{script: its `knobs.read`} of the scripts of a task or of all, what they share first."""
    paths = sorted(results.ROOT.glob(f"{task}/*.py"),
                   key=lambda path: (path.parent, path.stem != "task", path))
    return {results.shown(path): read_knobs(path) for path in paths}


read_knobs = functools.cache(knobs.read)  # every table of knobs asks for those of all scripts


class Compiled(jinja2.BytecodeCache):
    """Templates compiled once in a process: pages and documents share most of them."""

    kept: dict[str, bytes] = {}

    def load_bytecode(self, bucket):
        if bucket.key + bucket.checksum in self.kept:
            bucket.bytecode_from_string(self.kept[bucket.key + bucket.checksum])

    def dump_bytecode(self, bucket):
        self.kept[bucket.key + bucket.checksum] = bucket.bytecode_to_string()


class Report:
    """What a template calls, over the results `found` in `root`; figures are collected while `target` is
    rendered.
    """

    def __init__(self, root: Path, found: dict, target: Path):
        self.root, self.found, self.target, self.figures = root, found, target, {}

    def step(self, run: str, task: str, step: str):
        missing = jinja2.StrictUndefined(f"{run}/{task}/{step} is missing")
        return self.found.get((run, task, step), missing)

    def used(self, run: str, task: str) -> dict:
        """{knob: value} of all steps of a run."""
        values = {}
        for key, result in self.found.items():
            values |= result["config"] if key[:2] == (run, task) else {}
        return values

    def headline(self, run: str, task: str) -> dict:
        """What the verdict of a run is about: {"what", "before", "after", "difference", "seeds" (a row over
        several trainings, or None), "verdict"}; see HEADS.
        """
        result, again = self.step(run, task, "04_eval"), self.found.get((run, task, "ablations"))
        what, metric, kind, wanted = HEADS[task]
        difference = row(result, **wanted)
        before, after = {"name": "control c2"}, {"name": "new c2"}
        if task == "task1_decoder":
            before, after = {"name": difference["name"].removeprefix("tuned minus ")}, {"name": "tuned"}
        elif task == "task2_encoder":
            before, after = {"name": "fp32 base"}, {"name": "tuned"}
        untrained = result if task == "task3_tokenizer" else self.step(run, task, "02_baseline")
        sides = [row(where, table=kind, metric=metric, **which)
                 for where, which in ((untrained, before), (result, after))]
        seeds = rows(again, table="over seeds", kind=kind, metric=metric) if again else []
        seeds = seeds[0] if seeds else None
        return {"what": what, "before": sides[0], "after": sides[1],
                "difference": difference, "seeds": seeds,
                "verdict": seeds["seed_verdict"] if seeds else difference["verdict"]}

    def cost(self, run: str, task: str) -> dict:
        """{"minutes", "GiB" (the peak)} of the four steps of a run."""
        spent = [self.step(run, task, step)["cost"] for step in STEPS]
        return {"minutes": sum(one["seconds"] for one in spent) / 60,
                "GiB": max(one["peak_memory_bytes"] for one in spent) / 2**30}

    def beside(self, run: str, task: str) -> str | None:
        """The headline difference of the reader's own run `mine` of a profile, and whether it agrees with the
        reference run named like the profile; None if there is none."""
        own = self.found.get((MINE, task, "04_eval"))
        if not own or own["profile"] != run:
            return None
        return f"{signed(row(own, **HEADS[task][-1]))}: {agreement(own, self.step(run, task, '04_eval'))}"

    def stale(self, run: str) -> str:
        """Which results of a run are stale and why, or that none is."""
        found = [f"{task}/{step} ({reason})" for own, task, step in self.found if own == run
                 if (reason := fresh.changed(self.root / run / task / f"{step}.json"))]
        return "STALE: " + "; ".join(found) if found else "all results fresh"

    def bench(self, name: str) -> dict:
        """A comparison with named peers, as bench/ writes it."""
        path = self.root / "bench" / f"{name}.json"
        if not path.exists():
            return jinja2.StrictUndefined(f"results/bench/{name}.json is missing")
        return json.loads(path.read_text(encoding="utf-8"))

    def own_texts(self, run: str, task: str) -> dict[str, dict]:
        """{id: row} of the test rows of a run on own data; nothing of the corpus, whose texts are others'."""
        path = self.root.parent / "runs" / run / task / "test.jsonl"
        if self.found[run, task, "01_data"]["config"]["data"] == "corpus" or not path.exists():
            return {}
        return {row.get("id"): row for row in results.read_rows(path)}

    # -- figures: white ground, so that they can be read on dark pages ------------------------------------

    def forest(self, result: dict, name: str, title: str, unit: str, lines: dict[str, dict]) -> Markup:
        """An interval per line {label: row of a difference}; its colour is the row's verdict."""
        figure = Figure(figsize=(6.4, 0.28 * len(lines) + 0.9))
        axes = figure.add_subplot()
        axes.axvline(0, color="#868e96", lw=1)
        names = [results.visible(name).replace("$", r"\$") for name in lines]  # no formulas
        axes.set_yticks(range(len(lines)), names[::-1])
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
        return Markup(f"![{title}]({os.path.relpath(path, self.target.parent)})")


def bars(points: list[dict]) -> list[list[float]] | None:
    """How far the intervals of rows reach below and above their values, if all have one."""
    if all("lo" in row for row in points):
        return [[max(0, row["value"] - row["lo"]) for row in points],
                [max(0, row["hi"] - row["value"]) for row in points]]
    return None


# -- pages -----------------------------------------------------------------------------------------------

def fill(template: str, root: Path, found: dict, target: Path, **given) -> dict[Path, str]:
    """{path: text} of a filled template and the figures it asks for.

    jinja2.UndefinedError names a row or key that a template needs and a result does not have.
    """
    report = Report(root, found, target)
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                             finalize=printed, undefined=jinja2.StrictUndefined, trim_blocks=True,
                             lstrip_blocks=True, bytecode_cache=Compiled())
    env.globals |= {"rows": rows, "row": row, "like": like, "label": label, "found": found, "asked": asked,
                    "command": results.command, "changed": fresh.changed, "knobs_of": knobs_of,
                    "root": root, "target": target, "fastest": fastest, "HEADS": HEADS, "STEPS": STEPS,
                    "REFERENCE": results.REFERENCE}
    env.globals |= {name: getattr(report, name) for name in (
        "step", "used", "own_texts", "forest", "curve", "headline", "bench", "cost", "beside", "stale")}
    env.filters |= {"number": number, "p": p_value, "code": code, "label": label, "repr": repr,
                    "signed": signed, "short": short, "clustered": clustered, "percent": percent}
    with matplotlib.rc_context(STYLE):
        text = env.get_template(template).render(**given)
    if ".ru." in target.name:  # there a comma would be a decimal sign
        text = re.sub(r"(?<=\d),(?=\d{3}\b)", "\u00a0", text)
    return {target: re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", **report.figures}


def pages(root: Path, found: dict) -> dict[Path, str]:
    """{path: text} of the page of each run and task in `found`."""
    filled = {}
    for run, task, step in found:
        if step == "01_data":
            filled |= fill("page.md.j2", root, found, root / run / task / "README.md", run=run, task=task)
    return filled


def side_by_side(root: Path, first: str, second: str) -> dict[Path, str]:
    """{path: text} of a page per task that both runs have evaluated."""
    found, filled = load_all(root, first) | load_all(root, second), {}
    for task in sorted({key[1] for key in found}):
        both = [found[run, task, "04_eval"] for run in (first, second) if (run, task, "04_eval") in found]
        if len(both) == 2:
            target = root / f"{first}+{second}" / task / "README.md"
            filled |= fill("pair.md.j2", root, found, target, both=both, paired=paired_rows(root, both))
    return filled


def paired_rows(root: Path, both: list[dict]) -> list[dict]:
    """Result rows of "second minus first", item by item, for two runs of a task; none for what was not
    scored on the same items, or if the items of a run are not under runs/ as its 04 left them.
    """
    from common import stats
    task, items, rows = both[0]["task"], [], []
    for result in both:
        name = next(name for name in result["artifacts"] if name.startswith("items"))
        path = root.parent / "runs" / result["run"] / task / name
        if not path.exists() or results.sha256(path) != result["artifacts"][name]:
            return []
        stored = json.loads(path.read_text(encoding="utf-8"))
        items.append(stored.get("new c2", stored))
    module = importlib.import_module(f"{task}.task")
    listed = [*getattr(module, "TABLES", {}).values(), getattr(module, "ACCURACY", ()), module.METRICS]
    metrics = {metric.name: metric for metrics in listed for metric in metrics if metric.better}.values()
    for table, first in items[0].items():
        second = items[1].get(table, [])
        for metric in metrics if len(first) == len(second) else ():
            has = functools.partial(measured, metric)
            pairs = [pair for pair in zip(first, second) if all(map(has, pair))]
            same = all(one.get(metric.bottom) == other.get(metric.bottom) for one, other in pairs)
            if len(pairs) > 1 and same:  # tokens differ if the tokenizer does
                with contextlib.suppress(ValueError):  # other items
                    rows += stats.delta_rows(table, "second minus first", *map(list, zip(*pairs)), [metric])
    return rows


def measured(metric, item: dict) -> bool:
    """Whether an item has what the metric is computed from."""
    with contextlib.suppress(KeyError):
        return metric.columns([item]) is not None
    return False


STEPS = ("01_data", "02_baseline", "03_train", "04_eval")
MINE = results.default_run("cpu")
# task -> (what its headline is, metric, table, the row of 04 with the difference)
HEADS = {
    "task1_decoder": ("NLL per token of held-out answers", "nll_per_token", "heldout",
                      {"table": "headline", "metric": "nll_per_token"}),
    "task2_encoder": ("MRR@10 of the search in the pool", "mrr@10", "pool",
                      {"table": "headline", "kind": "pool"}),
    "task3_tokenizer": ("bits per byte around the terms", "bits_per_byte", "term windows", {
        "table": "minus control: term windows", "name": "new c2", "metric": "bits_per_byte"})}


def agreement(own: dict, reference: dict) -> str:
    """Whether two results of 04 agree: their intervals overlap, and the versions that differ. They are not
    compared if a knob differs."""
    differ = [knob for knob, value in own["config"].items() if reference["config"].get(knob, value) != value]
    if differ:
        return f"other {', '.join(differ)}"
    one, other = (row(result, **HEADS[own["task"]][-1]) for result in (own, reference))
    said = "agrees" if one["lo"] <= other["hi"] and other["lo"] <= one["hi"] else "differs"
    packages = ("torch", "transformers", "peft", "scikit-learn")
    versions = [f"{name} {mine}, reference {theirs}" for name in packages
                if (mine := own["env"].get(name)) != (theirs := reference["env"].get(name))]
    return said + (f" ({'; '.join(versions)})" if versions else "")


def summary(root: Path, run: str) -> str:
    """A line per task that `run` has evaluated, beside the reference run of the same profile, in plain text.
    """
    lines = [("task", "what", run, "reference", "")]
    for (_, task, step), mine in load_all(root, run).items():
        path = root / mine["profile"] / task / "04_eval.json"
        if step != "04_eval":
            continue
        what, *_, wanted = HEADS[task]
        other, said = "-", "no reference"
        if path.exists() and mine["profile"] != run:
            reference = results.read(path)
            other, said = signed(row(reference, **wanted)), agreement(mine, reference)
        lines.append((task, what, signed(row(mine, **wanted)), other, said))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
                     for line in lines)


# -- putting it together ---------------------------------------------------------------------------------

def render(root: Path) -> dict[Path, str]:
    """{path: text} of report and README in both languages, the pages and their figures, from the results in
    the folder `root`."""
    found, filled = load_all(root), {}
    real = {key: result for key, result in found.items() if result["profile"] != "smoke"}
    for name, template in DOCUMENTS.items():
        filled |= fill(template, root, real, root.parent / name)
    return filled | pages(root, found)


def outdated(files: dict[Path, str]) -> dict[Path, str]:
    """Those of the rendered `files` that differ from what there is."""
    return {path: text for path, text in files.items()
            if not path.exists() or path.read_text(encoding="utf-8") != text}


def bare_figures(source: str) -> list[str]:
    """The words with a digit in a template's prose that are no reference to a result, no code and no link,
    but for those that FIGURES allows."""
    code = r"{#.*?#}|{{.*?}}|{%.*?%}|```.*?```|`[^`\n]*`"
    for gone in (code, r"\[[^]\n]*\]\([^)\n]*\)", r"^    .*$", FIGURES):
        source = re.sub(gone, "", source, flags=re.DOTALL if gone == code else re.MULTILINE)
    return re.findall(r"\S*\d\S*", source)


def prose_problems(folder: Path) -> list[str]:
    """What is wrong with the templates of `folder`: figures typed into prose, and translations that mention
    other numbers than the original or were not looked at after it changed (first line: its hash)."""
    wrong = [f"report/{path.relative_to(folder)}: figure {figure!r} is typed, not a reference to a result"
             for path in sorted(folder.glob("[er][nu]/*.j2"))
             for figure in bare_figures(path.read_text(encoding="utf-8"))]
    for path in sorted(folder.glob("ru/*.j2")):
        original, text = folder / "en" / path.name, path.read_text(encoding="utf-8")
        if original.exists():
            source = original.read_text(encoding="utf-8")
            names, others = (set(re.findall(r"\bt[1-3]\.\w+", words)) for words in (source, text))
            if names != others:
                wrong.append(f"report/ru/{path.name}: other numbers than in en/: {sorted(names ^ others)}")
            if (now := results.digest(source)) not in text.partition("\n")[0]:
                wrong.append(f"report/ru/{path.name}: en/{path.name} has changed: translate it, then write "
                             f"{now} into the first line")
    return wrong


def form_problems(files: dict[Path, str], sized: bool = True) -> list[str]:
    """Rendered documents above their size (if `sized`), and tables with more than eight columns in them; in
    any file, a table that a blank line tears apart, which shows its rest as plain text.
    """
    wrong = []
    for path, text in files.items():
        wrong += [f"{results.shown(path)}: a blank line inside a table, before {torn[2][:60]}"
                  for torn in re.finditer(r"^(\|.*\|)\n\n(\|.*\|)\n(?!\|( -+ \|)+$)", text, re.MULTILINE)]
        if path.name in MOST_BYTES:
            size = len(text.encode())
            wrong += [f"{path.name} has {size:,} bytes, at most {MOST_BYTES[path.name]:,} are wanted"] * (
                sized and size > MOST_BYTES[path.name])
            wrong += [f"{path.name}: a table of more than 8 columns: {line[:60]}"
                      for line in text.splitlines() if re.fullmatch(r"\|( -+ \|){9,}", line)]
    return wrong


def problems(root: Path) -> list[str]:
    """What `check` complains about, a line each."""
    found = prose_problems(Path(__file__).parent)
    for script, own in knobs_of().items():
        found += [f"{script}: knob {name!r} has no reason in a comment above it"
                  for name, knob in own.items() if not knob["reason"]]
    loaded = load_all(root)
    for key, result in loaded.items():
        path = root.joinpath(*key).with_suffix(".json")
        if result["profile"] != "smoke" and (reason := fresh.changed(path)):
            remedy = results.command(path, result["profile"],
                                     asked(loaded, *key[:2]) | result["settings"])
            found.append(f"{results.shown(path)} is stale ({reason}): {remedy}")
    files = render(root)
    found += form_problems(files, sized=not any(run == MINE for run, *_ in loaded))  # whose column adds to it
    return found + [f"{results.shown(path)} is out of date: make report" for path in outdated(files)]


def main(argv: list[str]) -> int:
    root = results.ROOT / "results"
    if argv == ["check"]:
        wrong = problems(root)
        for name in sorted({name for result in load_all(root).values() for name in result["inputs"]}):
            if name.startswith("outside:"):
                print(f"not compared: {name.removeprefix('outside:')}, which lies outside the repository")
        print("\n".join(wrong) or "report, pages, results and reasons are current")
        return bool(wrong)
    if argv[:1] == ["summary"] and len(argv) == 2:
        print(summary(root, argv[1]))
        return 0
    if len(argv) == 2:
        files = side_by_side(root, *argv)
    else:
        files = pages(root, load_all(root, *argv[0].split("/", 1))) if argv else render(root)
    if not files or argv[2:]:
        raise SystemExit(f"RUNS={' '.join(argv)!r}: expected one run, or two that have evaluated the same "
                         "task")
    for path, text in outdated(files).items():
        results.write_atomic(path, text)
        print(f"wrote {results.shown(path)}")
    for path in files:
        if argv and path.suffix == ".md":
            print(results.shown(path))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except jinja2.UndefinedError as missing:
        sys.exit(f"report: {missing}")
