"""What every training needs around the library's Trainer: log lines, checkpoints to resume from, memory."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import accelerate
import psutil
import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from common import models
from pipeline import results, runner

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
# Bytes by which a process on a CPU grows for each byte in use: the C library's heap keeps freed blocks that
# lie between others. With 4, 8 and 16 rows of 180 tokens (SmolLM2-135M in NF4) the process grew by 1.3, 2.6
# and 5.3 GB, its tensors by 1.0, 2.0 and 4.0.
HEAP = 1.33
SPARE = 0.9  # share of the free memory to plan with: allocators lose some, and scoring needs some
ADAM = 12  # bytes a trained parameter costs beside itself: a gradient and two moments in fp32


def per_process(batch_size: int) -> int:
    """Rows of a global batch that one process computes. SystemExit if they cannot be divided evenly."""
    if batch_size % PROCESSES:
        raise SystemExit(f"batch_size={batch_size} cannot be divided among {PROCESSES} processes: "
                         "take a multiple")
    return batch_size // PROCESSES


def options(compute: str) -> dict:
    """Arguments of TrainingArguments that are no choice: device, number format `compute`, and quiet output.

    fp16 brings the library's gradient scaler.
    """
    return {"use_cpu": models.device().type == "cpu", "bf16": compute == "bf16", "fp16": compute == "fp16",
            "report_to": "none", "disable_tqdm": not sys.stderr.isatty(), "logging_nan_inf_filter": False}


def one_process(args):
    """Training arguments for one GPU a process: the library would spread one process over all with
    DataParallel.
    """
    args._n_gpu = min(1, args.n_gpu)
    return args


class Log(TrainerCallback):
    """One key=value line through `log` for each reading: `names`, the step, what is left, those of `keys` it
    has.

    SystemExit for a loss or gradient that is not finite: nothing after it would be worth keeping.
    """

    def __init__(self, log, keys: tuple[str, ...], **names):
        self.log, self.keys, self.names = log, keys, names

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {key: logs[key] for key in self.keys if key in logs}
        if not all(math.isfinite(values.get(key, 0)) for key in ("loss", "grad_norm")):
            raise SystemExit(f"step {state.global_step}: loss {values['loss']}, gradient norm "
                             f"{values.get('grad_norm')}; lower the learning rate")
        if values and state.is_world_process_zero:
            step, last = state.global_step, state.max_steps
            if done := step - self.first:  # at the first reading nobody knows what is left
                left = (time.monotonic() - self.began) / 60 * (last - step) / done
                values = {"minutes_left": round(left, 1), **values}
            self.log(**self.names, step=f"{step}/{last}", percent=f"{step / last:.0%}", **values)


class TensorBoard(TensorBoardCallback):
    """The library's callback: one curve if a run was resumed, nothing of an earlier run, and not the
    arguments, which name folders of this machine.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if runner.MAIN_PROCESS:
            if not state.global_step:
                shutil.rmtree(self.logging_dir, ignore_errors=True)
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)


def tensorboard(folder: Path) -> list[TensorBoard]:
    """[the callback that writes the curves into `folder`], or [] if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return []

    def once(caught):  # an error of its writing thread, as of a full disk, is raised again where it is used
        if not issubclass(caught.exc_type, OSError):
            threading.__excepthook__(caught)
    threading.excepthook = once
    callback = TensorBoard()
    callback.logging_dir = folder
    return [callback]


def main_process_first():
    """A context that the first process passes before the others; alone it does nothing."""
    return accelerate.PartialState(cpu=not torch.cuda.is_available()).main_process_first()


def open_checkpoints(folder: Path, identity: list) -> str | None:
    """The last checkpoint in `folder` to resume from, or None.

    Checkpoints of another `identity` (knobs, data) are removed, because resuming would mix two runs, and so
    is one that a kill cut short: the library writes its state last.
    """
    digest, stored = results.digest(identity), folder / "identity"
    with main_process_first():
        if runner.MAIN_PROCESS:
            if folder.exists() and not (stored.exists() and stored.read_text() == digest):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            stored.write_text(digest)
            for checkpoint in folder.glob("checkpoint-*"):
                state = checkpoint / "trainer_state.json"
                if not (state.exists() and state.read_text().rstrip().endswith("}")):
                    shutil.rmtree(checkpoint)
        last = get_last_checkpoint(str(folder))
    if last:
        print(f"resuming from step {last.rsplit('-', 1)[1]} ({results.shown(folder)})", flush=True)
    return last


def remove(checkpoints: Path) -> None:
    """Delete checkpoints, their identity first: without it nothing resumes from what a kill leaves."""
    (checkpoints / "identity").unlink()
    shutil.rmtree(checkpoints)


def finish() -> None:
    """Leave the process group, so that the first process may go on alone while the others end."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def saved_bytes(model, forward, compute: str, wide: int = 0) -> dict[str, int]:
    """Bytes of the distinct tensors that `forward()` keeps for the backward pass of `model`, by PyTorch's
    hooks.

    {"activations", "logits"}; logits are those whose last dimension is `wide`. Nothing is known here about
    architectures. The random generators are as before.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, tuple[str, int]] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kind = "logits" if tensor.dim() and tensor.shape[-1] == wide else "activations"
            sizes[storage.data_ptr()] = (kind, storage.nbytes())
        return tensor.detach()  # the tensor itself would keep its own graph alive
    model.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.random.fork_rng(), hooks, models.autocast(compute):
        forward()
    return {kind: sum(size for what, size in sizes.values() if what == kind)
            for kind in ("activations", "logits")}


def predict(model, **parts: int) -> dict[str, int]:
    """Bytes of a training step: `parts`, what is in use now ("resident"), the optimiser's, and their
    "total".
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {"adapter_and_optimiser": ADAM * trained, **parts}
    if model.device.type == "cuda":
        resident, heap = torch.cuda.memory_allocated(), 1.0
    else:
        resident, heap = psutil.Process().memory_info().rss, HEAP
    return {"resident": resident, **parts, "total": resident + int(heap * sum(parts.values()))}


def fits(predicted: dict[str, int], free: int) -> bool:
    """Whether what is not in use yet fits into `free` bytes."""
    return predicted["total"] - predicted["resident"] <= SPARE * free
