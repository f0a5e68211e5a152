"""What begins to need a generation or a dataset version holds it: a deletion at that moment waits, and is then refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.datasets import get_version
from core.db.deletion import delete_version
from core.db.generations import delete_generation
from core.db.pseudo_labels import create_set
from core.db.runs import create_run
from core.db.session import Database
from core.errors import StillReferenced
from ml.recipes import build_recipe
from ml.validation import to_dict
from tests.workers.builders_reuse import LABELING, SELECTION, add_generation, add_pool

FILE = {"digest": "0" * 64, "num_bytes": 1}
WEIGHTS = {"model.safetensors": FILE}


def begin_a_set(session: Session, chooser: str, pool: str, kept_out: str, teacher: str) -> object:
    return create_set(
        session,
        generation_id=teacher,
        unlabeled_version_id=pool,
        num_images=4,
        labeling=LABELING,
        selection=SELECTION,
        seed=0,
        capability="cpu",
        runtime={"device": "cpu"},
        evaluation_version_ids=[kept_out],
        selection_generation_id=chooser,
    )


def begin_a_run(session: Session, weights: str, pool: str, _kept_out: str, _teacher: str, name: str = "run", **network: Any) -> object:
    network = network or {"initial_weights": f"generation:{weights}"}
    recipe = build_recipe("digits", {"name": name, "students": [{"network": network}]})
    version = get_version(session, pool)
    facts: dict[str, Any] = {"labeled": version, "unlabeled": version, "validation": None, "test": None, "initial_generation_id": None}
    return create_run(session, name="run", recipe=to_dict(recipe), iterations=1, **facts)


@pytest.mark.parametrize(
    ("begin", "delete", "what"),
    [(begin_a_set, delete_generation, "chooser"), (begin_a_run, delete_generation, "chooser"), (begin_a_set, delete_version, "test")],
)
def test_what_begins_to_be_needed_is_not_deleted(
    begin: Callable[..., object], delete: Callable[[Session, str], object], what: str, postgresql_url: str
) -> None:
    database = Database(postgresql_url)
    chooser, teacher = (add_generation(database, WEIGHTS, ["cat", "dog"]) for _ in range(2))
    pool, kept_out = (add_pool(database, FILE, 4, name=name) for name in ("pool", "test"))
    needed = {"chooser": chooser, "test": kept_out}[what]

    with database.transaction() as session:
        begin(session, chooser, pool, kept_out, teacher)
        refuse_to_wait(database, lambda other: delete(other, needed))

    with database.transaction() as session, pytest.raises(StillReferenced):
        delete(session, needed)
    database.close()


def refuse_to_wait(database: Database, delete: Callable[[Session], object]) -> None:
    with database.transaction() as session:
        session.execute(sa.text("SET LOCAL lock_timeout = '100ms'"))
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            delete(session)
        session.rollback()


@pytest.mark.parametrize(
    "looks", [{"initial_weights": "local-dir:/models/hydrogen_b0"}, {"initial_weights": "teacher", "name": "generation:0"}]
)
def test_what_only_looks_like_a_generation_is_none(looks: dict[str, str], sqlite_url: str) -> None:
    database = Database(sqlite_url)
    pool = add_pool(database, FILE, 4, name="pool")

    with database.transaction() as session:
        begin_a_run(session, "", pool, "", "", **looks)
    database.close()
