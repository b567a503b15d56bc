"""What is done to a process before its script runs: every file operation counted and perhaps the last, little
memory, a wrong clock, a disk of its own. Only the standard library, as in forked.py: what imports `pipeline`
here would be the script's `pipeline` too, which then writes into this repository.
"""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")


def count_operations(log: str, root: str, last: int = 0) -> None:
    """Write a line to `log` before every operation that changes a file below `root`, as Python sees it; right
    before the one numbered `last` the process kills itself.
    """
    sys.dont_write_bytecode = True
    file, number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0

    def hook(event, arguments):
        nonlocal number
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        if os.path.isabs(path) and not path.startswith(root):  # names without a folder are rmtree's
            return
        number += 1
        os.write(file, f"{event} {path.removeprefix(root)}\n".encode())
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def default_interrupt() -> None:
    """Ctrl-C interrupts, as on a terminal; a job in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def limit_memory(more: int) -> None:
    """Let the address space grow by `more` bytes only. Tokenizers start no threads, as under make: Rust ends
    a process that cannot have one."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def wrong_clock(shift: float, jump_after: int, jump: float) -> None:
    """A clock that is `shift` seconds off, and after `jump_after` readings another `jump`."""
    real, readings = time.time, 0

    def wrong():
        nonlocal readings
        readings += 1
        return real() + shift + (jump if readings > jump_after else 0)

    time.time = wrong


def namespace(network: bool = False) -> None:
    """Mounts of this process's own, as an unprivileged user may have; with `network` no network either.
    OSError where the system does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, new_network = 0x10000000, 0x00020000, 0x40000000
    if libc.unshare(new_user | new_mounts | (new_network if network else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def small_disk(root: str, size: int):
    """runs/ and results/ of `root` on a disk of `size` bytes of this process's own, filled with what they
    hold. Returns a function that copies what they hold then to `root`/left. OSError or CalledProcessError
    where that is not possible.
    """
    namespace()
    disk = os.path.join(root, "disk")
    os.makedirs(disk, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk)
    for name in ("runs", "results"):
        subprocess.run(["cp", "-a", os.path.join(root, name), disk], check=True)
        mount("--bind", os.path.join(disk, name), os.path.join(root, name))
    left = os.path.join(root, "left")
    shutil.rmtree(left, ignore_errors=True)
    return lambda: subprocess.run(["cp", "-a", disk, left], check=True)


def read_only(root: str) -> None:
    """runs/ of `root` read-only for this process."""
    namespace()
    runs = os.path.join(root, "runs")
    mount("--bind", runs, runs)
    mount("-o", "remount,bind,ro", runs)
