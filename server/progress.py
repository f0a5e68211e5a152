"""Live progress as server-sent events, read from the event rows: any replica can go on where another stopped.

One poller a process asks the database for the counters of everything that is watched, in one query, and for what is new, in another;
all streams are served from that. A stream reads rows by itself only where it begins, or when it fell behind. A job's numbers are given out
under a row lock, and a run's by whoever reads them here, to what is committed; so `number > the last one sent` leaves no gap and repeats
nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
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

from core.db.events import list_job_events, list_run_events, order_events, order_events_of_one
from core.db.session import AWAY, Database
from core.db.tables import Event, Job, Run
from core.errors import InvalidRequest, Overloaded
from core.ids import absent
from core.lifecycle import JOB_TERMINAL, RUN_ENDED
from core.logs import get_log

POLL_SECONDS = 0.25
KEEP_ALIVE_SECONDS = 15.0
BATCH = 200
"""Events that a stream holds at most: what a slow reader costs."""
MAX_WATCHES = 1000
TAIL = 50
"""Latest events of each watched row that are kept for all its streams; who is further behind reads rows."""
READERS = 4
"""Streams that read rows at one moment: when hundreds come at once, other requests still find a thread."""
ORDER_SECONDS = 1.0
"""On PostgreSQL a reader waits this long for somebody who moves the run on just now, and then shows what was numbered before. On SQLite it
waits its turn to write, as everybody does there."""
ORDER_TURN_SECONDS = 0.25
"""So long the poller numbers events of runs that are watched, while the streams of jobs wait for it."""
_ROWS_A_QUERY = 100


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
RUN_EVENTS = Source("run", Run, list_run_events, lambda event: event.run_number, RUN_ENDED)


Key = tuple[str, str]
"""Noun and id of a row."""
Line = tuple[int, str]
"""An event's number and how a stream sends it."""


@dataclass(eq=False, slots=True)
class Watch:
    """Somebody who waits for one job or run to change."""

    source: Source
    row_id: str
    status: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> Key:
        return self.source.noun, self.row_id

    async def wait(self, seconds: float) -> bool:
        """True when something changed; False when `seconds` passed first."""
        try:
            async with asyncio.timeout(seconds):
                await self.changed.wait()
        except TimeoutError:
            return False
        return True


class ProgressHub:
    """Wakes everybody who watches, and tells what is new, by a few polling queries for all of them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.stopping = False
        self._watches: set[Watch] = set()
        self._marks: dict[Key, tuple[int, str]] = {}
        self._tails: dict[Key, list[Line]] = {}
        self._readers = asyncio.Semaphore(READERS)
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
            self._readers = asyncio.Semaphore(READERS)
            self._poller = loop.create_task(self._poll())

    async def _poll(self) -> None:
        self._marks, self._tails = {}, {}
        while self._watches and not self.stopping:
            await asyncio.sleep(POLL_SECONDS)
            try:
                marks, news = await run_in_threadpool(self._look)
            except sqlalchemy.exc.SQLAlchemyError:
                # The database is away; the streams' own reads say so to their readers.
                continue
            before, self._marks = self._marks, marks
            self._tails = {key: _lengthen(self._tails.get(key, []), news.get(key, [])) for key in marks}
            for watch in tuple(self._watches):
                mark = marks.get(watch.key)
                if mark is not None and (before.get(watch.key) != mark or watch.status is None):
                    watch.status = mark[1]
                    watch.changed.set()

    def _look(self) -> tuple[dict[Key, tuple[int, str]], dict[Key, list[Line]]]:
        """The counters of all that is watched, and the events that raised them since the last look."""
        marks: dict[Key, tuple[int, str]] = {}
        news: dict[Key, list[Line]] = {}
        watched = [(source, self._list_watched(source)) for source in (JOB_EVENTS, RUN_EVENTS)]
        runs = watched[1][1]
        _try_to_order(lambda: order_events(self.database, runs, for_seconds=ORDER_TURN_SECONDS))
        with self.database.reading() as session:
            for source, ids in watched:
                table = source.table
                moved: dict[str, int] = {}
                for start in range(0, len(ids), 500):
                    query = sa.select(table.id, table.num_events, table.status).where(table.id.in_(ids[start : start + 500]))
                    for row_id, number, status in session.execute(query):
                        marks[source.noun, row_id] = number, status
                        before, _ = self._marks.get((source.noun, row_id), (number, ""))
                        if 0 < number - before <= TAIL:
                            moved[row_id] = before
                for event in _list_news(session, source, moved):
                    row_id = event.job_id if source is JOB_EVENTS else str(event.run_id)
                    item = _show(event, source)
                    news.setdefault((source.noun, row_id), []).append((item.number, _format(item)))
        return marks, news

    def _list_watched(self, source: Source) -> list[str]:
        return sorted({watch.row_id for watch in tuple(self._watches) if watch.source is source})

    def tell(self, watch: Watch, after: int) -> list[Line] | None:
        """What the row has above `after` as far as the poller has seen; None when only rows can tell."""
        number, _ = self._marks.get(watch.key, (None, ""))
        if number is None:
            return None
        if number <= after:
            return []
        lines = [line for line in self._tails.get(watch.key, []) if line[0] > after]
        is_whole = bool(lines) and lines[0][0] == after + 1 and lines[-1][0] == after + len(lines) >= number
        return lines if is_whole else None

    async def read(self, source: Source, row_id: str, after: int, *, limit: int = BATCH) -> EventPage:
        """From the rows."""
        async with self._readers:
            return await run_in_threadpool(_read, self.database, source, row_id, after, limit)

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
    """The events above `after`. The status is read first: whoever sees a final one sees every event before it.

    A run's are numbered when it ends, so this holds for those, too.
    """
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
    page = await hub.read(source, row_id, start, limit=1 if wants_stream else limit)
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


def _read(database: Database, source: Source, row_id: str, after: int, limit: int) -> EventPage:
    if source is RUN_EVENTS:
        _try_to_order(lambda: order_events_of_one(database, row_id, wait_seconds=ORDER_SECONDS))
    with database.reading() as session:
        return read_events(session, source, row_id, after=after, limit=limit)


def _try_to_order(order: Callable[[], None]) -> None:
    """A run's new events get their numbers now. Where nothing can be written, as on a full disk, those that have theirs are still read."""
    try:
        order()
    except AWAY as error:
        get_log().warning("events.not_ordered", error=str(error).splitlines()[0])


async def _stream(hub: ProgressHub, source: Source, row_id: str, after: int) -> AsyncIterator[str]:
    yield "retry: 1000\n\n"
    async with hub.watch(source, row_id) as watch:
        is_new = True
        while True:
            watch.changed.clear()
            # The status first: whoever sees a final one has every event before it in what is told or read next.
            status = watch.status
            lines = None if is_new else hub.tell(watch, after)
            if lines is None:
                page = await hub.read(source, row_id, after)
                lines, status, is_new = [(item.number, _format(item)) for item in page.items], page.status, False
            if lines:
                yield "".join(text for _, text in lines)
                after = lines[-1][0]
            if len(lines) == BATCH:
                is_new = True
                continue
            if status in source.ended:
                yield f"event: end\ndata: {json.dumps({'status': status})}\n\n"
                return
            if hub.stopping:
                return
            if not await watch.wait(KEEP_ALIVE_SECONDS):
                yield ": keep-alive\n\n"


def _format(item: EventView) -> str:
    return f"id: {item.number}\nevent: {item.kind}\ndata: {item.model_dump_json()}\n\n"


def _list_news(session: Session, source: Source, after: Mapping[str, int]) -> Iterator[Event]:
    """Events of several rows above a number each, in order."""
    row_id, number = (Event.job_id, Event.number) if source is JOB_EVENTS else (Event.run_id, Event.run_number)
    rows = list(after.items())
    for start in range(0, len(rows), _ROWS_A_QUERY):
        newer = sa.or_(*(sa.and_(row_id == one, number > last) for one, last in rows[start : start + _ROWS_A_QUERY]))
        yield from session.scalars(sa.select(Event).where(newer).order_by(number))


def _lengthen(tail: list[Line], lines: list[Line]) -> list[Line]:
    """The latest lines without a hole, and without those that are there already."""
    last = tail[-1][0] if tail else 0
    if lines and lines[0][0] > last + 1:
        # More came between two looks than is kept: what stood before them says nothing of what is missing.
        return lines[-TAIL:]
    return [*tail, *(line for line in lines if line[0] > last)][-TAIL:] if lines else tail
