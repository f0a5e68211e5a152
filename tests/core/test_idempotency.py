"""One key, one answer."""

from __future__ import annotations

import pytest
import sqlalchemy.exc

from core.db.api_keys import create_api_key, find_api_key, get_shared_secret, revoke_api_key
from core.db.idempotency import find_answer, remember_answer
from core.db.session import Database
from core.errors import IdempotencyMismatch


def remember(database: Database, *, key: str = "k", fingerprint: str = "f") -> None:
    with database.transaction() as session:
        remember_answer(session, key=key, api_key_id="a", fingerprint=fingerprint, status_code=202, body={"id": "x"}, location="/x")


def test_the_second_use_of_a_key_finds_the_first_answer(database: Database) -> None:
    remember(database)

    with database.reading() as session:
        record = find_answer(session, key="k", api_key_id="a", fingerprint="f")
        other = find_answer(session, key="k", api_key_id="b", fingerprint="f")

    assert record is not None
    assert (record.status_code, record.body, record.location) == (202, {"id": "x"}, "/x")
    assert other is None


def test_a_key_that_came_with_another_request_is_refused(database: Database) -> None:
    remember(database)

    with database.reading() as session, pytest.raises(IdempotencyMismatch, match="take a new key"):
        find_answer(session, key="k", api_key_id="a", fingerprint="another")


def test_two_answers_to_one_key_cannot_both_be_committed(database: Database) -> None:
    remember(database)

    with pytest.raises(sqlalchemy.exc.IntegrityError):
        remember(database)


def test_a_secret_finds_its_key_until_it_is_revoked(database: Database) -> None:
    with database.transaction() as session:
        key, secret = create_api_key(session, name="test", scopes=["predict"])
        assert secret not in str(vars(key))
        found = find_api_key(session, secret)
        assert found is not None
        assert found.id == key.id
        revoke_api_key(session, key.id)

        assert find_api_key(session, secret) is None


def test_all_replicas_share_one_secret(database: Database) -> None:
    with database.transaction() as session:
        first = get_shared_secret(session, "cursors")
    with database.transaction() as session:
        assert get_shared_secret(session, "cursors") == first
