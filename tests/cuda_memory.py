"""Too little memory on a GPU: one line that names the knobs and the size that did not fit, and a plan that
fits where one is asked for. `make faults` tries it where there is a GPU; alone:

    python -m tests.cuda_memory [rows.jsonl]     a row for each case to rows.jsonl, exit 1 for a loss
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline import results

CAPPED = """
import runpy, sys, torch
cap, script, *arguments = sys.argv[1:]
torch.cuda.set_per_process_memory_fraction(float(cap) * 2**30 / torch.cuda.mem_get_info()[1])
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
# (step, GiB that PyTorch may take, knobs, whether it has to end well)
CASES = [("01_data", 8.0, [], True),
         ("02_baseline", 0.4, [], False),
         ("03_train", 1.0, ["batch_size=512", "rows_per_pass=512", "gradient_checkpointing=off"], False),
         ("03_train", 8.0, ["batch_size=512", "memory_gib=2"], True)]
SIZES = ["max_steps=2", "eval_every=2", "n_benchmark=2", "n_general=8"]


def tried(step: str, cap: float, knobs: list[str], ends: bool) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CAPPED, str(cap), f"task1_decoder/{step}.py", "--run", "memory", "--set",
         *SIZES, *knobs], cwd=results.ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(
            [str(results.ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, check=False)
    last = (done.stderr.strip() or "nothing").splitlines()[-1]
    words = ["out of memory", "eval_batch_size", "rows_per_pass", "MODEL="]
    words += ["GiB were predicted"] * (step == "03_train")
    good = done.returncode == 0 if ends else (
        done.returncode != 0 and "Traceback" not in done.stderr and all(word in last for word in words))
    print(f"{step} with {cap} GiB, {' '.join(knobs)}: {'ok' if good else 'WRONG'}: {last[:300]}", flush=True)
    if not good:
        print(done.stdout[-1500:], done.stderr[-3000:])
    return {"table": "faults", "fault": "CUDA out of memory", "task": "task1_decoder", "step": step,
            "moment": f"{cap} GiB, {' '.join(knobs)}", "result": "ok" if good else "lost"}


if __name__ == "__main__":
    rows = [tried(*case) for case in CASES]
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    sys.exit(any(row["result"] != "ok" for row in rows))
