"""Whether a result is current: its arguments and the hashes of all it was made from are what they were.

Make gives the order of the steps and asks this before each; on an up-to-date tree that takes a fraction of a
second.

    python -m pipeline.fresh results/cpu/task1_decoder/03_train.json [the step's own arguments]

exits with 0 and says "fresh", with 1 and names what changed, or with 2 if the arguments are wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import knobs, results
from sources import hub


def changed(path: Path, args=None, given=()) -> str | None:
    """What differs between now and when the result at `path` was made; None if nothing does.

    Of a file or folder outside the repository results keep the name only: it is compared if it is among the
    sources in `args` (paths `given`) or beside one of them.
    """
    if not path.exists():
        return "no result yet"
    try:
        result = results.read(path)
    except SystemExit as err:
        return str(err)
    if args:
        asked = results.stored(args.settings)
        given = [Path(args.settings[name]).expanduser() for name in results.SOURCES if name in args.settings]
        if (args.profile, asked) != (result["profile"], result["settings"]):
            return (f"asked for profile={args.profile} {asked}, "
                    f"stored is profile={result['profile']} {result['settings']}")
    for name, old in result["inputs"].items():
        kind, _, rest = name.rpartition(":")
        if kind == "step":
            source = path.with_name(f"{rest}.json")
            if reason := changed(source, given=given):
                return f"{rest} is stale ({reason})"
            now = results.result_hash(results.read(source))
        elif kind.startswith("hub:"):  # a clone without the repository in its cache keeps its results
            now = hub.cached_revision(rest, kind.removeprefix("hub:")) or old
            if now != old:
                return f"{rest} is at commit {now[:12]}, was {old[:12]}"
        elif kind == "outside":
            places = [place for path in given for place in (path, path.with_name(rest))
                      if place.name == rest and place.exists()]
            now = results.source_hash(places[0]) if places else old
        elif (results.ROOT / rest).exists():
            now = results.source_hash(results.ROOT / rest)
        else:
            return f"{name} is gone"
        if now != old:
            return f"{name} changed"
    return None


def stale_reason(path: Path, args=None) -> str | None:
    """None if the step that writes `path` need not run with `args`, else why.

    A clone has results but not runs/: what a step left there matters only if a later step has to run.
    """
    if reason := changed(path, args):
        return reason
    result = results.read(path)
    folder = results.ROOT / "runs" / result["run"] / result["task"]
    missing = [name for name in result["artifacts"] if not (folder / name).exists()]
    scripts = sorted((results.ROOT / result["task"]).glob("[0-9]*.py"))
    later = [script.stem for script in scripts if script.stem > result["step"]]
    later += ["ablations"] * path.with_name("ablations.json").exists()
    for step in later if missing else []:
        if reason := changed(path.with_name(f"{step}.json")):
            return f"{results.shown(folder / missing[0])} is missing and {step} may need it ({reason})"
    return None


def main(argv: list[str]) -> int:
    if not argv:
        raise SystemExit("usage: python -m pipeline.fresh results/RUN/TASK/STEP.json [arguments]")
    path = Path(argv[0]).absolute()
    script = results.ROOT / path.parent.name / f"{path.stem}.py"
    try:
        reason = stale_reason(path, knobs.parse_arguments(argv[1:], script))
    except SystemExit as wrong:  # the arguments, not the result: running the step would only say it again
        print(wrong, file=sys.stderr)
        return 2
    print(f"{path.parent.name}/{path.stem}: {'fresh' if reason is None else 'stale, ' + reason}")
    return reason is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
