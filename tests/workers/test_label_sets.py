"""Pseudo-label sets that belong to no run: labeled, selected, canceled."""

from __future__ import annotations

from core.db import jobs
from core.db.pseudo_labels import cancel_set, create_set, get_set
from core.db.runs import list_iterations
from core.db.session import Database
from tests.workers.test_controller import add_dataset, add_run, finish_next, play, read_run, result_of
from workers.controller import advance_all
from workers.outcomes import record_success


def add_set(database: Database) -> str:
    """A pseudo-label set of its own, of a generation that was trained before."""
    run_id = add_run(database, iterations=0)
    play(database)
    recipe = read_run(database, run_id).recipe
    with database.transaction() as session:
        [zero] = list_iterations(session, run_id)
        row = create_set(
            session,
            generation_id=zero.generation_id or "",
            unlabeled_version_id=add_dataset(session, "pool", "unlabeled").id,
            num_images=40,
            labeling=recipe["labeling"],
            selection=recipe["selection"],
            seed=0,
            capability="cpu",
            runtime=recipe["runtime"],
            evaluation_version_ids=[],
        )
        return row.id


def test_a_set_without_a_run_is_labeled_and_selected(database: Database) -> None:
    set_id = add_set(database)

    assert play(database) == ["label", "label", "label", "select"]
    with database.reading() as session:
        assert get_set(session, set_id).status == "ready"


def test_a_set_that_was_canceled_while_its_selection_ended_stays_canceled(database: Database) -> None:
    set_id = add_set(database)
    for _ in range(3):
        finish_next(database)
    advance_all(database)
    with database.transaction() as session:
        selection = jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)
        assert selection is not None
    with database.transaction() as session:
        cancel_set(session, set_id)

    with database.transaction() as session:
        made, files = result_of(selection, top1=0.5)
        assert record_success(session, selection, made, files, {}) is not None

    with database.reading() as session:
        assert get_set(session, set_id).status == "canceled"
