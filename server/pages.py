"""Lists in pages: newest first, from a signed cursor on, so that rows added meanwhile neither shift nor repeat anything."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import sqlalchemy as sa
from fastapi import Depends, Query
from pydantic import BaseModel
from sqlalchemy.orm import InstrumentedAttribute, Session

from core.errors import InvalidRequest

Row = TypeVar("Row")
Item = TypeVar("Item")
SIGNATURE_BYTES = 16


class Page(BaseModel, Generic[Item]):
    """Some items, and where the next ones begin."""

    items: list[Item]
    next_cursor: str | None = None
    """Send it as `cursor` to read on; null at the end."""


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Which page a request asks for."""

    limit: int
    cursor: str | None


async def read_page_query(
    limit: Annotated[int, Query(ge=1, le=200, description="Items a page.")] = 50,
    cursor: Annotated[str | None, Query(max_length=2000, description="`next_cursor` of the page before.")] = None,
) -> PageQuery:
    """Dependency: limit and cursor."""
    return PageQuery(limit, cursor)


PageDep = Annotated[PageQuery, Depends(read_page_query)]


class Cursors:
    """Makes and reads cursors: a position in one list, signed so that nobody can make up another."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encode(self, listing: str, position: list[Any]) -> str:
        """`listing` names the list with its filters; a cursor is good for that list only."""
        text = json.dumps(position, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._sign(listing, text) + text).decode().rstrip("=")

    def decode(self, listing: str, cursor: str) -> list[Any]:
        """The position; InvalidRequest when it was altered or belongs to another list."""
        try:
            raw = base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest("cursor is not one that this service gave out", parameter="cursor") from error
        signature, text = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(listing, text)):
            raise InvalidRequest("cursor is not one that this service gave out for this list with these filters", parameter="cursor")
        position: list[Any] = json.loads(text)
        return position

    def _sign(self, listing: str, text: bytes) -> bytes:
        return hmac.new(self._key, listing.encode() + b"\0" + text, hashlib.sha256).digest()[:SIGNATURE_BYTES]


def read_page(
    session: Session,
    query: sa.Select[Row],
    by: InstrumentedAttribute[str],
    page: PageQuery,
    *,
    cursors: Cursors,
    listing: str,
    among: tuple[InstrumentedAttribute[Any], Any] | None = None,
) -> tuple[list[Row], str | None]:
    """Rows of one page by descending `by` (an id, so newest first), and the cursor of the next one.

    `among` (column, value) keeps those whose column has the value, and reads them from the index over both columns.
    """
    order: tuple[InstrumentedAttribute[Any], ...] = (by,)
    if among is not None:
        # As an equality, PostgreSQL would sooner read all rows from the newest one on and drop the others, as if those that
        # are looked for lay everywhere among them; when they are all old, it reads a million.
        column, value = among
        query, order = query.where(column >= value, column <= value), (column, by)
    if page.cursor is not None:
        [position] = cursors.decode(listing, page.cursor)
        query = query.where(by < position if among is None else sa.tuple_(*order) < sa.tuple_(among[1], position))
    rows = list(session.scalars(query.order_by(*(column.desc() for column in order)).limit(page.limit + 1)))
    if len(rows) <= page.limit:
        return rows, None
    rows = rows[: page.limit]
    return rows, cursors.encode(listing, [getattr(rows[-1], by.key)])
