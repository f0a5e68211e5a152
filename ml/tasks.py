"""What is asked of one long piece of work, as JSON-able dataclasses, so that a process border changes nothing.

Paths are strings; `None` means absent. The service writes these into a job, `python -m ml` makes them from its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ml.config import ImageConfig, LabelingConfig, Recipe, RuntimeConfig, SelectionConfig, StudentConfig

Role = Literal["teacher", "student", "control"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTask:
    """Train one generation (or its control), evaluate it and export it."""

    role: Role
    """teacher: `recipe.teacher` on labels alone. student: `student` on both.
    control: `student`'s network, noise and steps on labels alone."""
    iteration: int
    """0 for the teacher."""
    recipe: Recipe
    """The run's whole recipe; its seed seeds everything."""
    runtime: RuntimeConfig
    """Resolved: no `auto` and no 0 threads (`ml.devices.resolve_runtime`)."""
    labeled: str
    """Manifest (Parquet) of the labeled images."""
    student: StudentConfig | None = None
    """The iteration's student; None for a teacher."""
    validation: str | None = None
    """Manifest of the validation images; None cuts `recipe.validation_ratio` from the labeled ones by the recipe's seed."""
    test: str | None = None
    """Manifest of the test images, evaluated once and only reported."""
    unlabeled: str | None = None
    """Manifest of the pool; needed by a student."""
    selected: str | None = None
    """Selected pseudo-labels (Parquet of `ml.selection`); needed by a student."""
    initial_weights: str | None = None
    """Folder of an exported generation that `teacher` or `generation:ID` was resolved to."""
    teacher: str | None = None
    """Folder of the teacher's exported generation; needed by a student that is distilled, which imitates it on labeled images too."""
    teacher_parameters: int | None = None
    """The teacher's number of parameters, to compare the student's with."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """JSON-able facts for the model card: run, teacher, datasets with digests, selection counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelingTask:
    """Label one shard of a pool with one generation, without noise."""

    generation: str
    """Folder of the exported generation that labels."""
    unlabeled: str
    """Manifest of the pool."""
    start: int
    """First manifest row of the shard."""
    stop: int
    """One past its last row."""
    labeling: LabelingConfig
    """How guesses are stored."""
    runtime: RuntimeConfig
    """Resolved."""
    output: str
    """Parquet file to write; when it is there already and complete, nothing is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionTask:
    """Choose and balance a teacher's guesses."""

    shards: tuple[str, ...]
    """Label shards, in any order."""
    unlabeled: str
    """Manifest of the pool, for digests."""
    evaluation: tuple[str, ...]
    """Manifests of every evaluation image (validation, test); their near-duplicates leave the pool."""
    class_names: tuple[str, ...]
    selection: SelectionConfig
    seed: int
    output: str
    """Selected pseudo-labels (Parquet) to write; its report lies beside it as `<output>.json`."""
    selection_shards: tuple[str, ...] = ()
    """Label shards of the separate selection model, when there is one."""
    keep_keys_of: str | None = None
    """Selected pseudo-labels of iteration 1 whose keys and repeats are kept (`reselect: false`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """Measure one exported generation on one manifest of labeled images."""

    generation: str
    manifest: str
    runtime: RuntimeConfig
    image: ImageConfig | None = None
    """None takes the generation's own preprocessing."""
