"""Render report.md: hand-written prose stays, the text between `<!-- begin NAME -->` and `<!-- end -->` is made from results/.

    python -m common.report          render figures and blocks (twice gives identical bytes)
    python -m common.report check    exit 1 if a block is out of date, a result is stale, or a knob has no reason

Nothing parses markdown, nothing is trained, and a number from the smoke profile never gets in. What a task says about itself is in
its section.py: BLOCKS = {name: function of the results}, figures(results) -> {path: SVG}, and if the verdict needs it note(results).
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import sys
from pathlib import Path

from common import results

REPORT = results.ROOT / "report.md"
TASKS = {"task1_decoder": "decoder QLoRA", "task2_encoder": "encoder QLoRA", "task3_tokenizer": "new tokens"}
LOWER = {"nll_per_token", "bits_per_byte", "repetition"}
STEPS = ("01_data", "02_baseline", "03_train", "04_eval")
# item of the assignment (points) -> the step whose result is the evidence
CHECKLIST = {
    "1.1 text-generation data set (0.5)": "task1_decoder/01_data",
    "1.2 pretrained decoder (0.5)": "task1_decoder/02_baseline",
    "1.3 quality before: basket and lm-eval (1)": "task1_decoder/02_baseline",
    "1.4 QLoRA, values explained in comments (2)": "task1_decoder/03_train",
    "1.5 quality after: same basket, same benchmark (1)": "task1_decoder/04_eval",
    "2.1 anchor + positive pairs (0.5)": "task2_encoder/01_data",
    "2.2 pretrained encoder (0.5)": "task2_encoder/02_baseline",
    "2.3 retrieval @k before (1)": "task2_encoder/02_baseline",
    "2.4 contrastive QLoRA, values explained in comments (2)": "task2_encoder/03_train",
    "2.5 retrieval @k after (1)": "task2_encoder/04_eval",
    "3.1-3.4 data, model, terms, how they split": "task3_tokenizer/02_baseline",
    "3.5-3.6 tokens added, trained in stages": "task3_tokenizer/03_train",
    "3.7 the embeddings judged": "task3_tokenizer/04_eval",
}

Found = dict[tuple[str, str, str], dict]


def load_all(root: Path) -> Found:
    """{(run, task, step): result} of every run but smoke ones, in a fixed order, "cpu" first."""
    found = {}
    for path in sorted(root.glob("*/*/*.json"), key=lambda p: (p.parts[-3] != "cpu", p.parts[-3:])):
        result = results.read(path)
        if result["profile"] != "smoke":
            found[result["run"], result["task"], result["step"]] = result
    return found


def main_run(found: Found, task: str) -> str | None:
    """The run a task's section shows: the first that reached 04."""
    return next((run for run, t, step in found if t == task and step == "04_eval"), None)


class Rows:
    """Look-up of long-form rows: all(table=..., model=...) in stored order, one(...) or None."""

    def __init__(self, result: dict | None):
        self.rows, self.config = (result["rows"], result["config"]) if result else ([], {})

    def all(self, **want) -> list[dict]:
        return [r for r in self.rows if all(r.get(k) == v for k, v in want.items())]

    def one(self, **want) -> dict | None:
        return next(iter(self.all(**want)), None)


# -- markdown ----------------------------------------------------------------------------------------------------------------------

def number(value, digits: int = 3) -> str:
    """For people: three decimals, two significant digits below 0.01, a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.{digits}f}" if abs(value) >= 0.01 else f"{value:.2g}"


def p_value(p) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def millions(parameters) -> str:
    return "–" if parameters is None else f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def interval(row) -> str:
    if row is None:
        return "–"
    return number(row["value"]) + (f" [{number(row['lo'])}, {number(row['hi'])}]" if row.get("lo") is not None else "")


def table(head: list[str], body: list[list]) -> str:
    def line(cells):
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", "<br>") for c in cells) + " |"
    return "\n".join(map(line, [head, ["---"] * len(head), *body])) if body else "not run"


def code(text: str, limit: int = 300) -> str:
    """Model output or prompt inside a table cell, as code, cut at `limit` characters."""
    text = text if len(text) <= limit else text[:limit] + " ..."
    for old, new in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("*", "&#42;"), ("_", "&#95;"), ("`", "&#96;"),
                     ("\n", "<br>"), ("  ", "&nbsp;&nbsp;")):
        text = text.replace(old, new)
    return f"<code>{text}</code>"


def fold(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


# -- blocks every task shares ------------------------------------------------------------------------------------------------------

def headline(result: dict) -> list[tuple[dict, dict, dict]]:
    """(base, tuned, delta) rows of the headline table."""
    rows = Rows(result)
    return [(*(rows.one(table="headline", model=m, metric=delta["metric"]) for m in ("base", "tuned")), delta)
            for delta in rows.all(table="headline", model="delta")]


def verdict(found: Found) -> str:
    """A line per task for the run its section shows, and one below it for every run of the gpu profile."""
    lines = []
    for task, title in TASKS.items():
        first = main_run(found, task)
        if first is None:
            lines.append(f"- **{task}** ({title}): not run")
        for run in (r for r, t, step in found if (t, step) == (task, "04_eval")):
            if run == first or found[run, task, "04_eval"]["profile"] == "gpu":
                lines.append(f"- **{task}** ({title}, run `{run}`): " + judged(found, run, task) if run == first else
                             f"  - run `{run}`, {found[run, task, '04_eval']['config']['model']}: " + judged(found, run, task))
    return "\n".join(lines)


def judged(found: Found, run: str, task: str) -> str:
    """First headline, everything measured that is worse, and what the task's section has to add."""
    result = found[run, task, "04_eval"]
    base, tuned, delta = headline(result)[0]
    worse = [f"{r['table']} {r['metric']} {interval(r)}" for r in Rows(result).all(verdict="worse")
             if r["table"] != "headline" and (r["model"] == "delta" or r.get("in_verdict"))]
    own = {key: value for key, value in found.items() if key[0] == run}
    return (f"{delta['metric']} {number(base['value'])} -> {number(tuned['value'])}, delta {interval(delta)} (95 %), p {p_value(delta['p'])}, "
            f"n = {delta['n']}: **{delta['verdict']}**. Worse, with an interval that excludes 0: "
            f"{'; '.join(worse) or 'nothing of what is measured here'}."
            + "".join(f" {section.note(own)}" for section in sections() if task == section.TASK and hasattr(section, "note")))


def overview(found: Found) -> str:
    body = []
    for (run, task, step), result in found.items():
        if step == "04_eval":
            sizes = Rows(found.get((run, task, "02_baseline"))).one(table="size", metric="parameters") or {"value": None}
            costs = [found[run, task, s]["cost"] for s in STEPS if (run, task, s) in found]
            minutes = sum(c["seconds"] for c in costs) / 60
            peak = max(c["peak_memory_bytes"] for c in costs) / 2**30
            for base, tuned, delta in headline(result):
                name = f"{delta['metric']} ({'lower' if delta['metric'].split(',')[0] in LOWER else 'higher'} is better)"
                body.append([task, run, result["config"]["model"], millions(sizes["value"]), result["env"]["device"], name,
                             number(base["value"]), number(tuned["value"]), interval(delta), p_value(delta["p"]), delta["n"], delta["verdict"],
                             number(minutes, 1), number(peak, 1)])
    head = ["task", "run", "model", "parameters", "device", "metric", "base", "tuned", "delta [95 %]", "p", "n", "verdict", "minutes", "peak GiB"]
    return table(head, body)


def provenance(found: Found) -> str:
    lines = []
    for run in dict.fromkeys(run for run, _, _ in found):
        steps = {(t, s): r for (n, t, s), r in found.items() if n == run}
        env = next(iter(steps.values()))["env"]
        versions = ", ".join(f"{k} {env[k]}" for k in ("python", "torch", "transformers", "peft", "bitsandbytes", "lm-eval"))
        commits = {r["env"]["commit"] + (" with local changes" if r["env"]["dirty"] else "") for r in steps.values() if r["env"]["commit"]}
        stale = [f"{t}/{s} ({reason})" for t, s in steps if (reason := results.changed(path_of(run, t, s)))]
        lines.append(f"- run `{run}`: {env['device']}; {versions}; commit {', '.join(sorted(commits)) or 'none'}; "
                     f"{'STALE: ' + '; '.join(stale) if stale else 'all results fresh'}")
    return "\n".join(lines) or "not run"


def checklist(found: Found) -> str:
    def evidence(step):
        run = next((run for run, t, s in found if f"{t}/{s}" == step), None)
        return f"[{step}.json](results/{run}/{step}.json)" if run else "not run"
    return table(["item", "done in", "evidence"], [[item, f"[{step}.py]({step}.py)", evidence(step)] if (results.ROOT / f"{step}.py").exists()
                                                   else [item, f"{step}.py", evidence(step)] for item, step in CHECKLIST.items()])


def shown(found: Found, task: str, step: str) -> Rows | None:
    """Rows of a step in the run that the task's section shows; None if no run got that far."""
    run = main_run(found, task)
    return Rows(found.get((run, task, step))) if run else None


def each_run(task: str, step: str, block) -> str:
    """A block for the run a section shows and, folded, for every run of the gpu profile that has `step`."""
    def whole(found: Found) -> str:
        main, parts = main_run(found, task), []
        for run in dict.fromkeys(r for r, t, s in found if (t, s) == (task, step)):
            result = found[run, task, step]
            own = {key: value for key, value in found.items() if key[0] == run}
            if run == main:
                parts.insert(0, block(own))
            elif result["profile"] == "gpu":
                parts.append(fold(f"Run <code>{run}</code>: {result['config']['model']}, {result['env']['device']}", block(own)))
        return "\n\n".join(parts) or block(found)
    return whole


def cost(found: Found, task: str, title: str) -> str:
    """Minutes, peak memory and speed per step of the shown run; sizes and facts of its training folded under `title`."""
    run = main_run(found, task)
    if run is None:
        return "not run"
    steps = [[s, number(r["cost"]["seconds"] / 60, 1), number(r["cost"]["peak_memory_bytes"] / 2**30, 2), number(r["cost"]["tokens_per_second"], 0)]
             for (n, t, s), r in found.items() if (n, t) == (run, task) and s in STEPS]  # resumable, ablations has no time of its own
    facts = [r for step, name in (("02_baseline", "size"), ("03_train", "training")) for r in shown(found, task, step).all(table=name)]

    def value(r):
        return f"{r['value'] / 2**20:,.1f} MiB" if "bytes" in r["metric"] else number(r["value"])
    def name(r):
        return (f"{r['model']}, {r['stage']}: " if "stage" in r else "") + r["metric"].replace("_", " ")
    full = table(["quantity", "value"], [[name(r), value(r)] for r in facts])
    return table(["step", "minutes", "peak GiB", "tokens/s in training"], steps) + "\n\n" + fold(title, full)


def draw(found: Found, task: str, size: tuple[float, float], plots: dict) -> dict[Path, str]:
    """{path: SVG} of every run for `plots` {name: (step, function of its Rows and a figure)}, with fixed ids and no date.

    A function that adds no axes has nothing to show: no file.
    """
    import matplotlib
    from matplotlib.figure import Figure
    style = {"svg.hashsalt": "qlora", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    drawn = {}
    for run in dict.fromkeys(run for run, t, _ in found if t == task):
        for name, (step, plot) in plots.items():
            if (run, task, step) in found:
                with matplotlib.rc_context(style):
                    figure, buffer = Figure(figsize=size), io.StringIO()
                    plot(Rows(found[run, task, step]), figure)
                    if not figure.axes:
                        continue
                    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
                drawn[path_of(run, task, step).with_name(f"{name}.svg")] = re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.MULTILINE)
    return drawn


def choices(found: Found, task: str) -> str:
    """knob | value | reason, extracted from the comments beside the values; a value the shown run did not use is followed by its own."""
    parts, run = [], main_run(found, task)
    for path in sorted((results.ROOT / task).glob("*.py"), key=lambda p: (p.stem != "task", p.stem)):
        used = found.get((run, task, path.stem if path.stem != "task" else STEPS[-1]), {"config": {}})["config"]
        body = []
        for name, knob in results.knobs(path).items():
            if knob["value"]:
                other = f" (run `{run}`: `{used[name]}`)" if name in used and used[name] != literal(knob["value"]) else ""
                body.append([f"`{name}`", f"`{knob['value']}`{other}", knob["reason"]])
        if body:
            parts.append(f"**[{results.shown(path)}]({results.shown(path)})**\n\n" + table(["knob", "value", "reason"], body))
    return "\n\n".join(parts)


def literal(text: str):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text  # a named constant


def appendix(found: Found) -> str:
    kept = {"/".join(key): {part: result[part] for part in ("config", "env", "cost")} for key, result in found.items()}
    stored = [f"{name}\n{json.dumps(parts, indent=1, ensure_ascii=False)}" for name, parts in kept.items()]
    return fold("Every configuration, environment and cost", "```\n" + "\n\n".join(stored) + "\n```")


# -- putting it together -----------------------------------------------------------------------------------------------------------

def path_of(run: str, task: str, step: str) -> Path:
    return results.ROOT / "results" / run / task / f"{step}.json"


def sections() -> list:
    return [importlib.import_module(f"{task}.section") for task in TASKS if (results.ROOT / task / "section.py").exists()]


def blocks() -> dict:
    shared = {"verdict": verdict, "overview": overview, "provenance": provenance, "checklist": checklist, "appendix": appendix}
    return shared | {name: block for section in sections() for name, block in section.BLOCKS.items()}


def figures(found: Found) -> dict[Path, str]:
    return {path: svg for section in sections() for path, svg in section.figures(found).items()}


def render(text: str, found: Found) -> str:
    """`text` with every block replaced. SystemExit for a marker that names no block, or a block without a marker."""
    names, known = re.findall(r"<!-- begin (\S+) -->", text), blocks()
    if sorted(names) != sorted(known):
        raise SystemExit(f"report.md: markers and blocks differ: {sorted(set(names) ^ set(known)) or 'one stands twice'}")
    return re.sub(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{known[m[2]](found)}\n{m[3]}", text, flags=re.DOTALL)


def problems(found: Found) -> list[str]:
    out = []
    for path in sorted(results.ROOT.glob("task*/*.py")):
        for name, knob in results.knobs(path).items():
            for origin, entry in [("default", knob), *knob["profiles"].items()]:
                if entry["value"] and not entry["reason"]:
                    out.append(f"{results.shown(path)}: knob {name!r} ({origin}) has no reason in a comment beside or above it")
    for key in found:
        if reason := results.changed(path_of(*key)):
            remedy = results.command(path_of(*key), found[key]["profile"], found[key]["settings"])
            out.append(f"{results.shown(path_of(*key))} is stale ({reason}): {remedy}")
    text = REPORT.read_text(encoding="utf-8")
    if render(text, found) != text:
        out.append("report.md is out of date: make report")
    return out


def main(argv: list[str]) -> int:
    found = load_all(results.ROOT / "results")
    if argv == ["check"]:
        wrong = problems(found)
        print("\n".join(wrong) or "report, results and reasons are current")
        return bool(wrong)
    if argv:
        raise SystemExit("usage: python -m common.report [check]")
    text = REPORT.read_text(encoding="utf-8")
    for path, new in {**figures(found), REPORT: render(text, found)}.items():
        if not path.exists() or path.read_text(encoding="utf-8") != new:
            results.write_atomic(path, new)
    print(f"report.md: {len(found)} results of {len({run for run, _, _ in found})} run(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
