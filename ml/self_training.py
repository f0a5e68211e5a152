"""The loop's decisions, pure and torch-free: what the next iteration is, or why there is none.

`python -m ml` and the service both ask `next_iteration`, so the two loops cannot differ.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml.config import Recipe, SelectionConfig, StudentConfig
from ml.errors import RecipeError
from ml.recipes import check_network, merge_config
from ml.validation import build, to_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRecord:
    """What the history tells of one generation; generation k stands at index k."""

    id: str
    validation_top1: float
    """Share of validation images in [0, 1] whose largest probability is their class."""
    num_parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationPlan:
    """One iteration, decided."""

    iteration: int
    """1 is the first student's."""
    teacher: str
    """Generation that labels."""
    student: StudentConfig
    control: bool
    """Also train the control."""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: student, control, warnings; the row of the iteration keeps it."""
        return {"student": to_dict(self.student), "control": self.control, "warnings": list(self.warnings)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """No further iteration, and why: `iterations.done` or `validation.gain`."""

    code: str
    message: str


def next_iteration(
    history: Sequence[GenerationRecord],
    recipe: Recipe,
    *,
    wanted: int | None = None,
    teacher: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> IterationPlan | Stop:
    """Decide what follows on `history` (generation 0 first, never empty).

    `wanted` replaces the recipe's count of iterations. `teacher` names another generation than the newest one. `overrides` is partial
    JSON laid over the student's config for this iteration; whoever passes it asked for exactly this iteration, so the stop rule is silent.
    """
    if not history:
        raise RecipeError("generation 0 must be trained before an iteration can be planned")
    iteration = len(history)
    wanted = recipe.iterations.count if wanted is None else wanted
    if iteration > wanted:
        return Stop(code="iterations.done", message=f"all {wanted} iterations are done")
    stop = _gain_too_small(history, recipe) if overrides is None and teacher is None else None
    if stop is not None:
        return stop
    student = recipe.students[min(iteration, len(recipe.students)) - 1]
    if overrides:
        student = build(StudentConfig, merge_config(to_dict(student), overrides))
        check_network(student.network, "/network")
    return IterationPlan(
        iteration=iteration,
        teacher=teacher or history[-1].id,
        student=student,
        control=recipe.iterations.control,
        warnings=_warnings(history),
    )


def check_thresholds(selection: SelectionConfig, class_names: Sequence[str]) -> None:
    """RecipeError when a class that has a threshold of its own is none of the labels' classes."""
    for name in selection.min_confidence_of:
        if name not in class_names:
            close = difflib.get_close_matches(name, class_names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; they are {', '.join(class_names[:10])}"
            raise RecipeError(f"min_confidence_of names {name!r}, which is no class of the labels{hint}", pointer="/min_confidence_of")


def _gain_too_small(history: Sequence[GenerationRecord], recipe: Recipe) -> Stop | None:
    """The stop rule looks at validation only; generation 0 has nothing to gain on, nor has who follows one that was not measured there."""
    least = recipe.iterations.min_validation_gain
    if least is None or len(history) < 2:
        return None
    gain = history[-1].validation_top1 - history[-2].validation_top1
    if gain >= least or math.isnan(gain):
        return None
    return Stop(
        code="validation.gain",
        message=f"generation {len(history) - 1} gained {gain:+.4f} on validation, less than the {least:+.4f} that the recipe asks for",
    )


def _warnings(history: Sequence[GenerationRecord]) -> tuple[str, ...]:
    if len(history) >= 2 and history[-1].validation_top1 < history[-2].validation_top1:
        worse = history[-2].validation_top1 - history[-1].validation_top1
        return (f"the teacher is {worse:.4f} worse on validation than the generation before it",)
    return ()
