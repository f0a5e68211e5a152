"""What `auto` means on a processor, told without tensors: a supervisor can so know a job's runtime before any process starts."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml.config import RuntimeConfig
from ml.cores import num_cores

# Where Linux lists them: x86 with AVX-512 BF16 or AMX, and Arm's BF16 extension.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def resolve_on_cpu(runtime: RuntimeConfig) -> RuntimeConfig:
    """The same runtime on the CPU, without `auto` and without 0 threads.

    The network gets every core: one loader worker takes a small share of their time with large images, and small ones
    are made between the steps (`ml.data`).
    """
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if _BF16_FLAGS & cpu_facts()["flags"] else "fp32"
    cores = num_cores()
    workers = min(cores - 1, 1) if runtime.num_loader_workers == "auto" else runtime.num_loader_workers
    return replace(runtime, device="cpu", precision=precision, num_threads=runtime.num_threads or cores, num_loader_workers=workers)


def cpu_facts() -> dict[str, Any]:
    """`model` and `flags` of the first processor; empty where the system does not say."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(reversed([(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]))
    return {
        "model": facts.get("model name") or platform.processor() or platform.machine(),
        "flags": frozenset((facts.get("flags") or facts.get("Features") or "").split()),
    }
