"""Aliases, and the history whose replay gives them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.session import now
from core.db.tables import Alias, Promotion
from core.errors import Conflict, NotFound, PreconditionFailed
from core.ids import new_id


def get_alias(session: Session, name: str) -> Alias:
    """NotFound when nothing was promoted to it."""
    alias = session.get(Alias, name, populate_existing=True)
    if alias is None:
        raise NotFound(f"there is no alias {name!r}: nothing was promoted to it yet")
    return alias


def move_alias(
    session: Session,
    name: str,
    generation_id: str,
    *,
    expected_version: int | None,
    action: str,
    actor: str | None,
    gate: dict[str, Any] | None = None,
    forced: bool = False,
    reason: str | None = None,
) -> Promotion:
    """Point the alias at a generation and append to its history.

    `expected_version` is the version the caller saw; None means it saw none. PreconditionFailed when somebody was faster.
    """
    moment = now(session)
    alias = session.get(Alias, name, with_for_update=True, populate_existing=True)
    current = alias.version if alias else None
    if current != expected_version:
        raise PreconditionFailed(
            f"alias {name!r} is at version {current}, not {expected_version}; read it again and decide anew", current_version=current
        )
    previous = alias.generation_id if alias else None
    # Versions never start over, so that an ETag seen once is never valid for something else.
    version = (session.scalar(sa.select(sa.func.max(Promotion.version)).where(Promotion.alias == name)) or 0) + 1
    if alias is None:
        session.add(Alias(name=name, generation_id=generation_id, version=version, updated_at=moment))
    else:
        alias.generation_id, alias.version, alias.updated_at = generation_id, version, moment
    promotion = Promotion(
        id=new_id("promotion"),
        alias=name,
        version=version,
        action=action,
        generation_id=generation_id,
        previous_generation_id=previous,
        forced=forced,
        reason=reason,
        gate=gate,
        actor=actor,
        created_at=moment,
    )
    session.add(promotion)
    session.flush()
    return promotion


def list_promotions(session: Session, alias: str) -> list[Promotion]:
    """The alias's history, oldest first."""
    return list(session.scalars(sa.select(Promotion).where(Promotion.alias == alias).order_by(Promotion.version)))


def rollback_target(session: Session, alias: str) -> str:
    """The generation that the alias pointed at before its current one: promotions push, rollbacks pop. Conflict when there is none."""
    stack: list[str] = []
    for move in list_promotions(session, alias):
        if move.action == "promote":
            stack.append(move.generation_id)
        else:
            stack.pop()
    if len(stack) < 2:
        raise Conflict(f"alias {alias!r} has no earlier generation to roll back to")
    return stack[-2]
