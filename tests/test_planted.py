"""Silent wrongness: each wrong line of tests/planted.py is caught by the tests that it names.

The code is copied once; a fault is applied to the copy, its tests run there in a process of their own, and
the line is put back. A test counts if it fails by what it asserts or by an error for users: a fault that only
breaks the import proves nothing.
"""

import json
import re
import time

import pytest

from pipeline import results
from sources import pretrained
from tests import forked
from tests.conftest import copy_repository
from tests.planted import FAST, FAULTS

CAUGHT = {f"call: {name}" for name in ("AssertionError", "SystemExit", "Failed", "ValueError")}
EACH = [pytest.param(fault, id=fault.name, marks=() if fault.name in FAST else pytest.mark.faults)
        for fault in FAULTS]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files of the repository without results; the embedded models are shared."""
    pretrained.resolve("embedded-135m")
    root = copy_repository(tmp_path_factory.mktemp("planted"), without="results")
    (root / "runs").mkdir()
    (root / "runs" / "assets").symlink_to(results.ROOT / "runs" / "assets")
    return root


def endings(root, *ids: str) -> tuple[int, dict[str, str], str]:
    """(exit code of pytest, {id: how it ended}, all that was said) of tests in `root`."""
    names = [f"tests/{name}" for name in ids]
    done = forked.run(root, "tests/planted.py", [f"--basetemp={root / 'tmp'}", *names], timeout=400)
    said = f"{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    assert done.stdout.strip(), said
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), said


def test_every_fault_names_one_line_and_tests_that_exist():
    assert len(FAULTS) >= 50 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert set(FAST) < {fault.name for fault in FAULTS}
    for fault in FAULTS:
        text = (results.ROOT / fault.file).read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, f"{fault.name}: {fault.old!r} stands {text.count(fault.old)} times"
        if fault.file.endswith(".py"):
            compile(text.replace(fault.old, fault.new), fault.file, "exec")
        for name in fault.caught_by:
            file, function = name.partition("[")[0].split("::")
            tests = (results.ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {function}\(", tests, re.M), f"{fault.name}: no test {name}"


@pytest.mark.faults
def test_all_these_tests_pass_without_a_fault(copy):
    ids = dict.fromkeys(name for fault in FAULTS for name in fault.caught_by)
    code, found, said = endings(copy, *ids)
    assert code == 0 and set(found.values()) == {"passed"}, said


@pytest.mark.parametrize("fault", EACH)
def test_a_planted_fault_is_caught(fault, copy, record):
    """By every test that it names."""
    path, started = copy / fault.file, time.time()
    clean = path.read_text(encoding="utf-8")
    try:
        path.write_text(clean.replace(fault.old, fault.new), encoding="utf-8")
        code, found, said = endings(copy, *fault.caught_by)
    finally:
        path.write_text(clean, encoding="utf-8")
    assert code == 1 and set(found.values()) <= CAUGHT | {"passed"}, f"{fault.name}: {found}\n{said}"
    for name in fault.caught_by:  # one of its parameters is enough
        ends = {end for test, end in found.items() if test.startswith(f"tests/{name}")}
        assert ends & CAUGHT, f"{fault.name} is not caught by {name}: {found}"
    record("planted faults", fault=fault.name, file=fault.file, caught_by=", ".join(fault.caught_by),
           seconds=round(time.time() - started, 1), result="caught")
