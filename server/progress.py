"""Live progress as server-sent events, read from the event rows: any replica can go on where another stopped.

One poller a process asks the database for the counters of everything that is watched, in one query; a stream reads rows only when
its counter moved. Numbers are given out under a row lock, so `number > the last one sent` leaves no gap and repeats nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
import sqlalchemy.exc
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from core.db.events import list_job_events, list_run_events
from core.db.session import Database
from core.db.tables import Event, Job, Run
from core.errors import InvalidRequest, Overloaded
from core.ids import absent
from core.lifecycle import JOB_TERMINAL

POLL_SECONDS = 0.25
KEEP_ALIVE_SECONDS = 15.0
BATCH = 200
"""Events that a stream holds at most: what a slow reader costs."""
MAX_WATCHES = 1000


class EventView(BaseModel):
    """One thing that happened; `data` depends on `kind`."""

    number: int
    """Without gaps within the job (or the run, when the run's events are read)."""
    kind: str
    job_id: str
    attempt: int
    at: datetime
    data: dict[str, Any]


class EventPage(BaseModel):
    """Events in order; read on with `after`."""

    items: list[EventView]
    next_after: int
    """Send it as `after` to read on."""
    status: str
    """Status of the job or run at that moment."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a stream's events come from."""

    noun: str
    table: type[Job] | type[Run]
    list_events: Callable[..., list[Event]]
    number: Callable[[Event], int | None]
    ended: tuple[str, ...]


JOB_EVENTS = Source("job", Job, list_job_events, lambda event: event.number, JOB_TERMINAL)
RUN_EVENTS = Source("run", Run, list_run_events, lambda event: event.run_number, ("completed", "failed", "canceled"))


@dataclass(eq=False, slots=True)
class Watch:
    """Somebody who waits for one job or run to change."""

    source: Source
    row_id: str
    status: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, seconds: float) -> bool:
        """True when something changed; False when `seconds` passed first."""
        try:
            async with asyncio.timeout(seconds):
                await self.changed.wait()
        except TimeoutError:
            return False
        return True


class ProgressHub:
    """Wakes everybody who watches, by one polling query for all of them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.stopping = False
        self._watches: set[Watch] = set()
        self._marks: dict[tuple[str, str], tuple[int, str]] = {}
        self._poller: asyncio.Task[None] | None = None

    @property
    def num_watches(self) -> int:
        """How many wait right now."""
        return len(self._watches)

    def stop(self) -> None:
        """The process ends: every stream closes now, and its reader comes back with Last-Event-ID."""
        self.stopping = True
        for watch in self._watches:
            watch.changed.set()

    @asynccontextmanager
    async def watch(self, source: Source, row_id: str) -> AsyncIterator[Watch]:
        """Be woken when the row's counter or status changes."""
        if len(self._watches) >= MAX_WATCHES:
            raise Overloaded(f"{MAX_WATCHES} event streams are open; close some, or poll instead", retry_after_seconds=5)
        watch = Watch(source, row_id)
        self._watches.add(watch)
        self._ensure_poller()
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    def _ensure_poller(self) -> None:
        loop = asyncio.get_running_loop()
        if self._poller is None or self._poller.done() or self._poller.get_loop() is not loop:
            self._poller = loop.create_task(self._poll())

    async def _poll(self) -> None:
        self._marks = {}
        while self._watches and not self.stopping:
            await asyncio.sleep(POLL_SECONDS)
            try:
                marks = await run_in_threadpool(self._read_marks)
            except sqlalchemy.exc.SQLAlchemyError:
                # The database is away; the streams' own reads say so to their readers.
                continue
            for watch in tuple(self._watches):
                key = (watch.source.noun, watch.row_id)
                mark = marks.get(key)
                if mark is not None and (self._marks.get(key) != mark or watch.status is None):
                    watch.status = mark[1]
                    watch.changed.set()
            self._marks = marks

    def _read_marks(self) -> dict[tuple[str, str], tuple[int, str]]:
        marks: dict[tuple[str, str], tuple[int, str]] = {}
        with self.database.reading() as session:
            for source in (JOB_EVENTS, RUN_EVENTS):
                table = source.table
                ids = sorted({watch.row_id for watch in tuple(self._watches) if watch.source is source})
                for start in range(0, len(ids), 500):
                    query = sa.select(table.id, table.num_events, table.status).where(table.id.in_(ids[start : start + 500]))
                    marks |= {(source.noun, row_id): (number, status) for row_id, number, status in session.execute(query)}
        return marks

    async def wait_for_end(self, source: Source, row_id: str, seconds: float) -> None:
        """Return when the row reached a final status, when `seconds` passed, or when the process ends."""
        deadline = asyncio.get_running_loop().time() + seconds
        async with self.watch(source, row_id) as watch:
            while not self.stopping and watch.status not in source.ended:
                left = deadline - asyncio.get_running_loop().time()
                watch.changed.clear()
                if left <= 0 or not await watch.wait(left):
                    return


def read_events(session: Session, source: Source, row_id: str, *, after: int, limit: int) -> EventPage:
    """The events above `after`. The status is read first: whoever sees a final one sees every event before it."""
    table = source.table
    status = session.scalar(sa.select(table.status).where(table.id == row_id))
    if status is None:
        raise absent(source.noun, row_id)
    items = [_show(event, source) for event in source.list_events(session, row_id, after=after, limit=limit)]
    return EventPage(items=items, next_after=items[-1].number if items else after, status=status)


def _show(event: Event, source: Source) -> EventView:
    number = source.number(event)
    assert number is not None
    return EventView(number=number, kind=event.kind, job_id=event.job_id, attempt=event.attempt, at=event.at, data=event.data)


async def answer_events(
    request: Request, hub: ProgressHub, source: Source, row_id: str, *, after: int | None, limit: int
) -> Response | EventPage:
    """A stream when the client accepts text/event-stream, else one page. `after` wins over the Last-Event-ID header."""
    start = after if after is not None else _last_event_id(request)
    wants_stream = "text/event-stream" in request.headers.get("accept", "")
    page = await run_in_threadpool(_read, hub, source, row_id, start, limit=1 if wants_stream else limit)
    if not wants_stream:
        return page
    if hub.num_watches >= MAX_WATCHES:
        raise Overloaded(f"{MAX_WATCHES} event streams are open; close some, or poll instead", retry_after_seconds=5)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(hub, source, row_id, start), media_type="text/event-stream", headers=headers)


def _last_event_id(request: Request) -> int:
    text = request.headers.get("last-event-id", "").strip() or "0"
    if not text.isdecimal() or len(text) > 15:
        raise InvalidRequest(f"Last-Event-ID {text[:40]!r} must be the number of an event")
    return int(text)


def _read(hub: ProgressHub, source: Source, row_id: str, after: int, limit: int = BATCH) -> EventPage:
    with hub.database.reading() as session:
        return read_events(session, source, row_id, after=after, limit=limit)


async def _stream(hub: ProgressHub, source: Source, row_id: str, after: int) -> AsyncIterator[str]:
    yield "retry: 1000\n\n"
    async with hub.watch(source, row_id) as watch:
        while True:
            watch.changed.clear()
            page = await run_in_threadpool(_read, hub, source, row_id, after)
            if page.items:
                yield "".join(_format(page.items))
                after = page.next_after
            if len(page.items) == BATCH:
                continue
            if page.status in source.ended:
                yield f"event: end\ndata: {json.dumps({'status': page.status})}\n\n"
                return
            if hub.stopping:
                return
            if not await watch.wait(KEEP_ALIVE_SECONDS):
                yield ": keep-alive\n\n"


def _format(items: Sequence[EventView]) -> list[str]:
    return [f"id: {item.number}\nevent: {item.kind}\ndata: {item.model_dump_json()}\n\n" for item in items]
