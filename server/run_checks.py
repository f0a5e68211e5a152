"""What must hold before a run's row is written: the recipe fits the data, and no evaluation image sits in what is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from core.db.datasets import check_folder, get_ready_version
from core.db.generations import get_generation
from core.db.tables import DatasetVersion, Generation
from core.errors import FolderRefused, InvalidRequest, LeakageFound, NotFound
from ml.config import NetworkConfig, Recipe, SelectionConfig
from ml.errors import RecipeError, TooFewLabels
from ml.schedules import check_batches
from ml.self_training import check_thresholds
from server.stored_files import StoredFiles

if TYPE_CHECKING:
    from ml.manifest import Manifest

MAX_KEYS_LISTED = 100
_BATCH_ROWS = 262_144
"""Rows of a pool's manifest that are looked at at a time: about 60 MB."""
KINDS = {"labeled": "labeled", "unlabeled": "unlabeled", "validation": "evaluation", "test": "evaluation"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Versions:
    """The dataset versions of one run."""

    labeled: DatasetVersion
    unlabeled: DatasetVersion
    validation: DatasetVersion | None
    test: DatasetVersion | None

    def evaluation(self) -> dict[str, DatasetVersion]:
        """Those that measure."""
        return {name: version for name, version in (("validation", self.validation), ("test", self.test)) if version is not None}


def find_versions(session: Session, references: Mapping[str, str | None]) -> Versions:
    """Resolve each reference to a ready version of the kind that its role needs, with the labeled classes where it has classes."""
    found: dict[str, DatasetVersion | None] = {}
    for role, kind in KINDS.items():
        reference = references[role]
        pointer = f"/datasets/{role}"
        try:
            found[role] = None if reference is None else get_ready_version(session, reference, kind=kind, pointer=pointer)
        except NotFound as error:
            raise InvalidRequest(str(error), pointer=pointer) from error
    versions = Versions(**found)  # type: ignore[arg-type]  # the schema makes labeled and unlabeled present
    for role, version in versions.evaluation().items():
        check_classes(version.class_names or [], of=f"the {role} images", labeled=versions.labeled, pointer=f"/datasets/{role}")
    return versions


def check_classes(class_names: list[str], *, of: str, labeled: DatasetVersion, pointer: str) -> None:
    """InvalidRequest when something measures or guesses other classes than the labeled images have."""
    mine = labeled.class_names or []
    if sorted(class_names) == sorted(mine):
        return
    missing, foreign = sorted(set(mine) - set(class_names)), sorted(set(class_names) - set(mine))
    parts = [f"without {', '.join(missing[:10])}"] if missing else []
    parts += [f"with {', '.join(foreign[:10])}, which the labeled images lack"] if foreign else []
    raise InvalidRequest(
        f"the classes of {of} differ from those of the labeled images: {' and '.join(parts)}",
        pointer=pointer,
        missing=missing[:MAX_KEYS_LISTED],
        foreign=foreign[:MAX_KEYS_LISTED],
    )


def find_initial_generation(session: Session, generation_id: str | None, labeled: DatasetVersion) -> Generation | None:
    """The generation that takes generation 0's place; its classes must be the labeled ones."""
    if generation_id is None:
        return None
    return find_labeler(session, generation_id, labeled, pointer="/initial_generation")


def find_labeler(session: Session, generation_id: str, labeled: DatasetVersion, *, pointer: str) -> Generation:
    """A generation that is there and guesses the labeled images' classes."""
    try:
        generation = get_generation(session, generation_id)
    except NotFound as error:
        raise InvalidRequest(str(error), pointer=pointer) from error
    check_classes(generation.class_names, of=f"generation {generation_id}", labeled=labeled, pointer=pointer)
    if generation.class_names != labeled.class_names:
        raise InvalidRequest(
            f"generation {generation_id} has the labeled images' classes in another order; a student needs them in alphabetical order",
            pointer=pointer,
            found=generation.class_names[:MAX_KEYS_LISTED],
        )
    return generation


def check_recipe_fits(
    session: Session, recipe: Recipe, versions: Versions, *, iterations: int, has_initial: bool, roots: tuple[Path, ...]
) -> None:
    """Refuse what would only fail hours later: too few labels, a pool below the cap, weights that are not there or not below a root."""
    _check_labels(recipe, versions, iterations=iterations, has_initial=has_initial)
    _check_pool(recipe, versions.unlabeled)
    if recipe.teacher.network.initial_weights == "teacher":
        raise RecipeError("generation 0 has no teacher to start from", pointer="/teacher/network/initial_weights")
    # With an initial generation no teacher is trained, so its weights are never opened.
    networks = [] if has_initial else [("/teacher/network", recipe.teacher.network)]
    networks += [(f"/students/{place}/network", student.network) for place, student in enumerate(recipe.students)]
    for pointer, network in networks:
        check_weights(session, network, pointer=f"/recipe{pointer}/initial_weights", roots=roots)
    selection_model = recipe.labeling.selection_model
    if selection_model is not None:
        find_selection_model(session, selection_model, versions.labeled, pointer="/recipe/labeling/selection_model")


def check_weights(session: Session, network: NetworkConfig, *, pointer: str, roots: tuple[Path, ...]) -> None:
    """InvalidRequest when `generation:ID` names none; FolderRefused when `local-dir:PATH` is no folder below a root."""
    kind, _, name = (network.initial_weights or "").partition(":")
    if kind == "generation":
        try:
            get_generation(session, name)
        except NotFound as error:
            raise InvalidRequest(str(error), pointer=pointer) from error
    elif kind == "local-dir":
        try:
            check_folder(name, roots)
        except FolderRefused as error:
            error.details["pointer"] = pointer
            raise
        except (OSError, RuntimeError, ValueError) as error:
            # A name that is too long or holds a zero byte, a folder that may not be entered, links in a circle.
            raise FolderRefused(f"folder {name[:200]!r} cannot be opened: {error}", pointer=pointer) from error


def find_selection_model(session: Session, reference: str, labeled: DatasetVersion | None, *, pointer: str) -> Generation:
    """The generation of `generation:ID`."""
    kind, _, generation_id = reference.partition(":")
    if kind != "generation" or not generation_id:
        raise InvalidRequest(f"selection_model {reference!r} must be 'generation:ID'", pointer=pointer)
    if labeled is not None:
        return find_labeler(session, generation_id, labeled, pointer=pointer)
    try:
        return get_generation(session, generation_id)
    except NotFound as error:
        raise InvalidRequest(str(error), pointer=pointer) from error


def _check_labels(recipe: Recipe, versions: Versions, *, iterations: int, has_initial: bool) -> None:
    labeled = versions.labeled
    refuse_thresholds(recipe.selection, labeled.class_names or [], pointer="/recipe/selection")
    num_training = labeled.num_usable or 0
    if versions.validation is None:
        counts: dict[str, int] = (labeled.report or {}).get("classes", {})
        lonely = sorted(name for name, count in counts.items() if count < 2)
        if lonely:
            raise InvalidRequest(
                f"without a validation dataset, each class needs two labeled images; {', '.join(lonely[:10])} have one",
                pointer="/datasets/labeled",
                classes=lonely[:MAX_KEYS_LISTED],
            )
        # At least one image of each class goes; how many exactly depends on duplicates, and the job counts them.
        num_training -= max(len(counts), int(recipe.validation_ratio * num_training) - len(counts))
    try:
        # Manual iterations begin with the first student too.
        check_batches(recipe, num_labeled=num_training, iterations=max(iterations, 1), has_teacher=has_initial)
    except TooFewLabels as error:
        raise InvalidRequest(str(error), pointer=f"/recipe{error.details['pointers'][0]}", **error.details) from error


def refuse_thresholds(selection: SelectionConfig, class_names: list[str], *, pointer: str) -> None:
    """InvalidRequest for a threshold of a class that there is not."""
    try:
        check_thresholds(selection, class_names)
    except RecipeError as error:
        raise InvalidRequest(str(error), pointer=f"{pointer}{error.pointer}") from error


def _check_pool(recipe: Recipe, unlabeled: DatasetVersion) -> None:
    cap = recipe.selection.cap_per_class
    pool = int((unlabeled.num_usable or 0) * recipe.selection.sample_ratio)
    if isinstance(cap, int) and cap > pool:
        raise InvalidRequest(
            f"cap_per_class {cap} asks for more images of each class than the pool's {pool} usable ones; lower it, or add images",
            pointer="/recipe/selection/cap_per_class",
            num_usable=pool,
        )


def check_all_leakage(files: StoredFiles, versions: Versions) -> None:
    """LeakageFound when what measures also sits in what is trained on, or the test in the validation, which chooses."""
    check_leakage(files, versions.evaluation(), {"labeled": versions.labeled, "unlabeled": versions.unlabeled})
    if versions.test is not None and versions.validation is not None:
        check_leakage(files, {"test": versions.test}, {"validation": versions.validation})


def check_leakage(files: StoredFiles, evaluation: Mapping[str, DatasetVersion], others: Mapping[str, DatasetVersion]) -> None:
    """LeakageFound when an evaluation image, by file or by pixels, also sits in the others. Reads manifests, so: no transaction."""
    num_keys, keys = list_leakage(files, evaluation, others)
    if num_keys:
        first = keys[0]
        raise LeakageFound(
            f"{num_keys} images of {' and '.join(sorted({key['other'] for key in keys}))} are also evaluation images, "
            f"for example {first['other']} {first['other_key']!r} is {first['evaluation']} {first['key']!r} by {first['by']}: "
            "remove them from either side",
            pointer=f"/datasets/{first['evaluation']}",
            keys=keys,
            num_keys=num_keys,
        )


def list_leakage(
    files: StoredFiles, evaluation: Mapping[str, DatasetVersion], others: Mapping[str, DatasetVersion]
) -> tuple[int, list[dict[str, Any]]]:
    """How many usable images of `others` also sit in `evaluation`, and the first of them: key, evaluation, other_key, other, by."""
    if not evaluation:
        return 0, []
    from ml.ingestion import find_leakage
    from ml.manifest import Manifest

    measured = []
    for version in evaluation.values():
        with _reading_manifest(files, version) as path:
            measured.append(Manifest.read(path))
    names = list(evaluation)
    keys: list[dict[str, Any]] = []
    num_keys = 0
    for other, version in others.items():
        with _reading_manifest(files, version) as path:
            for part in _parts(path):
                findings = find_leakage(measured, [part])
                num_keys += len(findings)
                listed = findings[: MAX_KEYS_LISTED - len(keys)]
                keys += [found | {"evaluation": names[found["evaluation"]], "other": other} for found in listed]
    return num_keys, keys


def _reading_manifest(files: StoredFiles, version: DatasetVersion) -> AbstractContextManager[Path]:
    assert version.manifest_digest is not None
    return files.reading(version.manifest_digest)


def _parts(path: Path) -> Iterator[Manifest]:
    """The manifest in pieces that hold only what leakage asks for: a pool may have a hundred million rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ml.manifest import Manifest

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["key", "digest", "pixel_digest", "status"]):
            yield Manifest("", "unlabeled", (), pa.Table.from_batches([batch]))
