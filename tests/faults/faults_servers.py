"""PostgreSQL, SQLite and Redis: away, slow, silent, forgetful, or lying about what they did."""

from __future__ import annotations

import signal
import sqlite3
import time
from contextlib import closing
from typing import Any

from core.queue import make_queue
from tests.faults.fault import BEYOND_LEASE_SECONDS, BEYOND_LEASES_SECONDS, POSTGRESQL, SQLITE, Fault, NotNow, Scene, beyond_lease
from tests.faults.members import Member
from tests.faults.servers import Postgresql, Redis

DELIVERIES = 100
COMMITS = 3


def postgresql_of(scene: Scene) -> Postgresql:
    assert scene.stage.postgresql is not None
    return scene.stage.postgresql


def redis_of(scene: Scene) -> Redis:
    assert scene.stage.redis is not None
    return scene.stage.redis


class DatabaseStopped(Fault):
    """PostgreSQL is killed and stays away for longer than three leases; meanwhile a worker is killed too, and has to start without it."""

    name, concerns, databases = "database stopped", "database", POSTGRESQL
    away_seconds = BEYOND_LEASES_SECONDS

    def strike(self, scene: Scene) -> dict[str, Any]:
        server, also = postgresql_of(scene), scene.chance.random() < 0.5
        server.stop()
        if also:
            scene.a_worker().signal(signal.SIGKILL)
        time.sleep(self.away_seconds)
        server.start()
        return {"worker_killed": also}


class DatabaseAwayForMinutes(DatabaseStopped):
    """The same for five minutes, at the leases of a chaos run a hundred of them."""

    name, takes_minutes, away_seconds = "database stopped for five minutes", True, 300.0


class DatabaseLocked(Fault):
    """Somebody holds SQLite's write lock for longer than three leases."""

    name, concerns, databases = "database locked", "database", SQLITE
    away_seconds = BEYOND_LEASES_SECONDS

    def strike(self, scene: Scene) -> dict[str, Any]:
        path = scene.stage.database_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(self.away_seconds)
            connection.execute("ROLLBACK")
        return {}


class ConnectionsEnded(Fault):
    """pg_terminate_backend for every connection, three times."""

    name, concerns, databases = "connections terminated", "database", POSTGRESQL

    def strike(self, scene: Scene) -> dict[str, Any]:
        ended = 0
        for _ in range(3):
            ended += postgresql_of(scene).end_connections()
            time.sleep(scene.chance.uniform(0.05, 0.6))
        return {"connections": ended}


class DatabaseSlow(Fault):
    """Every answer of the database takes a while."""

    name, concerns, databases = "database slow", "database", POSTGRESQL

    def strike(self, scene: Scene) -> dict[str, Any]:
        proxies = [member.database_proxy for member in scene.stage.members.all.values() if member.database_proxy]
        seconds = scene.chance.choice((0.02, 0.05))
        for proxy in proxies:
            proxy.delay_seconds = seconds
        time.sleep(BEYOND_LEASE_SECONDS)
        for proxy in proxies:
            proxy.delay_seconds = 0.0
        return {"seconds": seconds}


class DatabaseCut(Fault):
    """The connections of one process to the database are reset, again and again."""

    name, concerns, databases = "database connections reset", "database", POSTGRESQL

    def strike(self, scene: Scene) -> dict[str, Any]:
        member: Member = scene.chance.choice(list(scene.stage.members.all.values()))
        assert member.database_proxy is not None
        for _ in range(5):
            member.database_proxy.reset()
            time.sleep(scene.chance.uniform(0.05, 0.4))
        return {"member": member.name}


class DatabaseSilent(Fault):
    """A worker is cut off from the database, not from storage: nothing it says is answered, for longer than its lease."""

    name, concerns, databases = "database silent", "database", POSTGRESQL

    def strike(self, scene: Scene) -> dict[str, Any]:
        found = scene.stage.members.busy_worker(seconds=5)
        member = found[0] if found else scene.a_worker()
        assert member.database_proxy is not None
        member.database_proxy.silent = True
        beyond_lease(scene)
        member.database_proxy.speak_again()
        return {"member": member.name}


class CommitsLost(Fault):
    """Commits happen and are reported as failed."""

    name, concerns = "commit lost", "database"

    def strike(self, scene: Scene) -> dict[str, Any]:
        return self._by_proxy(scene) if scene.stage.postgresql else self._inside(scene)

    def _by_proxy(self, scene: Scene) -> dict[str, Any]:
        members = list(scene.stage.members.all.values())
        proxies = [member.database_proxy for member in members if member.database_proxy]
        before = sum(proxy.num_commits_cut for proxy in proxies)
        for proxy in proxies:
            proxy.commits_to_cut = COMMITS
        time.sleep(BEYOND_LEASE_SECONDS)
        for proxy in proxies:
            proxy.commits_to_cut = 0
        return self._count(sum(proxy.num_commits_cut for proxy in proxies) - before)

    def _inside(self, scene: Scene) -> dict[str, Any]:
        members = list(scene.stage.members.all.values())
        before = sum(member.count_effects("commit_lost") for member in members)
        for member in members:
            member.wish(commit_lost=0.25)
        time.sleep(BEYOND_LEASE_SECONDS)
        for member in members:
            member.wish()
        return self._count(sum(member.count_effects("commit_lost") for member in members) - before)

    def _count(self, lost: int) -> dict[str, Any]:
        if lost == 0:
            raise NotNow("nothing was committed")
        return {"commits": lost}


class MessagesMultiplied(Fault):
    """A hundred messages about one job."""

    name, concerns, databases = "message delivered ×100", "messages", POSTGRESQL

    def strike(self, scene: Scene) -> dict[str, Any]:
        one = scene.load.add_dataset(2_000_000 + scene.number)
        queue = make_queue(redis_of(scene).url)
        for _ in range(DELIVERIES):
            queue.publish(one.id, capability="cpu")
        return {"job": one.id}


class MessagesDropped(Fault):
    """Redis forgets everything while jobs are announced."""

    name, concerns, databases = "messages dropped", "messages", POSTGRESQL

    def strike(self, scene: Scene) -> dict[str, Any]:
        with closing(redis_of(scene).connect()) as broker:
            for part in range(3):
                scene.load.add_dataset(3_000_000 + 10 * scene.number + part)
                broker.flushall()
                time.sleep(0.1)
                broker.flushall()
        return {}


class BrokerStopped(Fault):
    """Redis is killed and started again later."""

    name, concerns, databases = "broker stopped", "messages", POSTGRESQL
    away_seconds = BEYOND_LEASE_SECONDS

    def strike(self, scene: Scene) -> dict[str, Any]:
        redis_of(scene).stop()
        time.sleep(self.away_seconds)
        redis_of(scene).start()
        return {}


class BrokerAwayForMinutes(BrokerStopped):
    """The same for five minutes: workers look for themselves meanwhile."""

    name, takes_minutes, away_seconds = "broker stopped for five minutes", True, 300.0


class BrokerSlow(Fault):
    """Redis is busy with something else for longer than a lease."""

    name, concerns, databases = "broker paused", "messages", POSTGRESQL

    def strike(self, scene: Scene) -> dict[str, Any]:
        with closing(redis_of(scene).connect()) as broker:
            broker.execute_command("CLIENT", "PAUSE", int(1000 * BEYOND_LEASE_SECONDS), "ALL")
        beyond_lease(scene)
        return {}


class BrokerCut(Fault):
    """The connections to Redis are reset, or go silent and are reset later."""

    name, concerns, databases = "broker cut off", "messages", POSTGRESQL

    def strike(self, scene: Scene) -> dict[str, Any]:
        proxies = [member.broker_proxy for member in scene.stage.members.all.values() if member.broker_proxy]
        silent = scene.chance.random() < 0.5
        for proxy in proxies:
            proxy.silent = silent
            if not silent:
                proxy.reset()
        if silent:
            beyond_lease(scene)
            for proxy in proxies:
                proxy.speak_again()
        return {"silent": silent}


KINDS: tuple[type[Fault], ...] = (
    DatabaseStopped,
    DatabaseAwayForMinutes,
    DatabaseLocked,
    ConnectionsEnded,
    DatabaseSlow,
    DatabaseCut,
    DatabaseSilent,
    CommitsLost,
    MessagesMultiplied,
    MessagesDropped,
    BrokerStopped,
    BrokerAwayForMinutes,
    BrokerSlow,
    BrokerCut,
)
