"""What every training here needs around the library's Trainer: one line per reading, checkpoints worth resuming from, several processes.

The loops themselves are the libraries'; knobs, losses and order of rows belong to the tasks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import accelerate
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from common import results

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def share(batch_size: int) -> int:
    """Rows of a global batch that one process sees. SystemExit if they cannot be dealt out evenly."""
    if batch_size % PROCESSES:
        raise SystemExit(f"batch_size={batch_size} cannot be split among {PROCESSES} processes: choose a multiple")
    return batch_size // PROCESSES


class Log(TrainerCallback):
    """One key=value line through `log` and, with `path`, one JSON line per reading; `keys` are what is kept, `names` go in front.

    SystemExit for a loss that is not finite: nothing after it would be worth keeping.
    """

    def __init__(self, log, keys: tuple[str, ...], path: Path | None = None, **names):
        self.log, self.keys, self.path, self.names = log, keys, path, names

    def on_log(self, args, state, control, logs=None, **kwargs):
        kept = {k: logs[k] for k in self.keys if k in logs}
        if not all(math.isfinite(kept.get(k, 0)) for k in ("loss", "grad_norm")):
            raise SystemExit(f"step {state.global_step}: loss {kept['loss']}, gradient norm {kept.get('grad_norm')}; lower the learning rate")
        if kept and state.is_world_process_zero:
            self.log(**self.names, step=f"{state.global_step}/{state.max_steps}", **kept)
            if self.path:
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"step": state.global_step, **kept}) + "\n")


def open_checkpoints(folder: Path, identity: list) -> tuple[str | None, Path]:
    """(last checkpoint to resume from or None, log of the readings up to it).

    Checkpoints of another identity (knobs, data) are removed: resuming would mix two runs. So is one that was cut short.
    """
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    stored, log = folder / "identity", folder / "log.jsonl"
    with accelerate.PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        if results.MAIN_PROCESS:
            if folder.exists() and not (stored.exists() and stored.read_text() == digest):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            stored.write_text(digest)
            for checkpoint in folder.glob("checkpoint-*"):  # the library writes in place, its state last: cut short, the process died meanwhile
                state = checkpoint / "trainer_state.json"
                if not (state.exists() and state.read_text().rstrip().endswith("}")):
                    shutil.rmtree(checkpoint)
        last = get_last_checkpoint(str(folder))
        if last and results.MAIN_PROCESS:
            print(f"resuming from step {last.rsplit('-', 1)[1]} ({results.shown(folder)})", flush=True)
        if results.MAIN_PROCESS:
            done = int(last.rsplit("-", 1)[1]) if last else -1  # readings after the checkpoint will be written again
            kept = [h for h in results.read_rows(log) if h["step"] <= done] if log.exists() else []
            results.write_atomic(log, "".join(json.dumps(h) + "\n" for h in kept))
    return last, log


def remove(checkpoints: Path) -> None:
    """Delete the checkpoints, their identity first: without it nothing resumes from what a kill leaves."""
    (checkpoints / "identity").unlink()
    shutil.rmtree(checkpoints)


def finish() -> None:
    """Leave the process group, so that the first process may go on alone while the others end."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
