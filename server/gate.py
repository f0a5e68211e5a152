"""The promotion gate: the candidate against the generation that an alias points at, on the validation images of both.

Test images never decide. Refused is what is certainly worse: the whole 95 % interval of the paired difference lies below 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import GateRefused

PREDICTIONS = "validation_predictions.parquet"


def compare_files(a_files: Mapping[str, Path], b_files: Mapping[str, Path], name: str) -> dict[str, Any] | str:
    """B minus A on the predictions stored under `name`, or why the two cannot be compared."""
    from ml.errors import DataError
    from ml.evaluation import compare

    for which, files in (("first", a_files), ("second", b_files)):
        if name not in files:
            return f"the {which} generation has no {name}"
    try:
        return compare(a_files[name], b_files[name])
    except DataError as error:
        return str(error)


def pass_gate(
    *, incumbent_id: str | None, incumbent: Mapping[str, Path], candidate_id: str, candidate: Mapping[str, Path], force: bool
) -> dict[str, Any]:
    """What the promotion's history keeps of the comparison; GateRefused unless the candidate may pass or is forced to."""
    if incumbent_id is None:
        return {"decision": "no-incumbent", "incumbent_generation_id": None}
    compared = compare_files(incumbent, candidate, PREDICTIONS)
    gate: dict[str, Any] = {"decision": "passed", "split": "validation", "incumbent_generation_id": incumbent_id}
    if isinstance(compared, str):
        gate |= {"decision": "not-comparable", "problem": compared}
        why = f"generation {candidate_id} cannot be compared with {incumbent_id}: {compared}"
    else:
        gate |= {"comparison": compared}
        low, high = compared["top1"]["interval"]
        if high >= 0:
            return gate
        gate |= {"decision": "worse"}
        why = (
            f"generation {candidate_id} is worse than {incumbent_id} on validation: top-1 {compared['top1']['difference']:+.4f}, "
            f"95 % interval {low:+.4f} to {high:+.4f}"
        )
    if force:
        return gate | {"decision": f"forced-{gate['decision']}"}
    raise GateRefused(f"{why}; promote it all the same with force and a reason", comparison=compared, gate=gate)
