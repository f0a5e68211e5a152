"""The runtime of a job: resolved by the first job of a run, kept by all others."""

from __future__ import annotations

from dataclasses import replace

from ml.config import RuntimeConfig
from ml.validation import build
from workers.jobs import Work


def settle_runtime(work: Work) -> RuntimeConfig:
    """The input's runtime without `auto`, reported to the supervisor. Imports torch."""
    from ml.devices import resolve_runtime

    asked = build(RuntimeConfig, work.input["runtime"])
    if asked.device == "auto" and "cuda" not in work.capabilities:
        # Later jobs of the run wait for the capability that this one used, so it uses none that the worker does not name.
        asked = replace(asked, device="cpu")
    runtime = resolve_runtime(asked)
    work.on_runtime(runtime)
    return runtime
