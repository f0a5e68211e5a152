"""Facts about processes of this machine: who is still the one it was, and who dies with whom. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the thread that started this process ends; exit at once when `parent` is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def boot_identity() -> str:
    """Names this boot of this machine, and the space in which its process ids count (containers have their own)."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it is dead. With the id it names a process of a boot for good."""
    try:
        # The second field is the program's name in brackets, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A zombie is dead; only its parent has not looked yet.
    return None if fields[0] in "ZX" else int(fields[19])


def has_nvidia_gpu() -> bool:
    """Whether a driver shows a GPU; asked of the system, because asking torch costs seconds."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def total_memory_bytes() -> int | None:
    """Memory of this machine, or of this container where that has less; None where the system does not tell."""
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        total = next(int(words[1]) * 1024 for words in lines if words[0] == "MemTotal:")
    except (OSError, StopIteration):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return min(total, int(limit)) if limit.isdecimal() else total


def count_oom_kills() -> int:
    """Processes that the kernel has killed for want of memory since boot, in any container; 0 where it does not count them."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
