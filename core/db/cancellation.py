"""Canceling all that is left of a run or a set, however much that is."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.events import append_same_event
from core.db.jobs import request_cancel
from core.db.session import now
from core.db.tables import Job


def hold_open_jobs(session: Session, *where: sa.ColumnElement[bool]) -> None:
    """Hold every queued or running job of which this holds until the transaction ends."""
    session.execute(sa.select(Job.id).where(*where, Job.status.in_(("queued", "running"))).order_by(Job.id).with_for_update())


def request_cancel_all(session: Session, *where: sa.ColumnElement[bool]) -> None:
    """Wish every queued or running job canceled of which this holds: the waiting ones in a few statements, however many they are."""
    moment = now(session)
    waiting = (
        sa.update(Job)
        .where(*where, Job.status == "queued")
        .values(status="canceled", cancel_requested_at=moment, finished_at=moment, num_events=Job.num_events + 1)
        .returning(Job.id, Job.num_events, Job.run_id, Job.attempt)
    )
    canceled = session.execute(waiting, execution_options={"synchronize_session": False}).all()
    append_same_event(session, canceled, ("canceled", {"while": "queued"}), at=moment)
    for job_id in session.scalars(sa.select(Job.id).where(*where, Job.status == "running").order_by(Job.id)).all():
        request_cancel(session, job_id)
