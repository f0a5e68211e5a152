"""The API over HTTP, typed: problems become exceptions, event streams resume by themselves, what starts work is sent once."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

API = "/api/v1"
TERMINAL = ("succeeded", "failed", "canceled")
TIMEOUT = httpx.Timeout(60.0, connect=5.0)
# The stream sends a comment every 15 s; three missing ones are a dead connection.
STREAM_TIMEOUT = httpx.Timeout(45.0, connect=5.0)
RECONNECT_SECONDS = 1.0
PATIENCE_SECONDS = 120.0
"""How long a service that answered before is waited for: replicas, proxies and databases are started anew within it."""
_PASSING = ("database_unavailable", "storage_unavailable", "unavailable", "unknown")
"""Codes of a 502, 503 or 504 that says nothing of the request; a proxy that reaches no replica has no code at all."""
JobListener = Callable[[dict[str, Any]], None]


class ApiProblem(Exception):
    """The service refused, or failed: an RFC 9457 problem."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status = status
        self.code = str(body.get("code", "unknown"))
        self.detail = str(body.get("detail") or body.get("title") or f"HTTP {status}")
        self.errors: list[dict[str, Any]] = list(body.get("errors") or [])
        self.details: dict[str, Any] = dict(body.get("details") or {})
        self.request_id = body.get("request_id")
        super().__init__(self.detail)

    @property
    def is_passing(self) -> bool:
        """Whether something behind the address is away for a while, whatever was asked for."""
        return self.status in (502, 503, 504) and self.code in _PASSING

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        facts = {"status": self.status, "code": self.code, "request_id": self.request_id}
        return facts | ({"errors": self.errors} if self.errors else {}) | ({"details": self.details} if self.details else {})


class NotReachable(Exception):
    """Nothing answers at the address."""


class JobFailed(Exception):
    """A job that was waited for ended without success."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        error = job.get("error") or {}
        super().__init__(f"job {job['id']} {job['status']}: {error.get('message', 'no reason was recorded')}")


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One server-sent event; `number` is None for the last one, `end`."""

    number: int | None
    kind: str
    data: dict[str, Any]


class Client:
    """One service, one key."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A proxy of the environment leads out; this machine is reached without one.
        direct = is_loopback(self.url)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=not direct)
        self._has_answered = False

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        body: Any = None,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
        again: bool = False,
    ) -> httpx.Response:
        """Send one request; ApiProblem for every answer that is no success, NotReachable when there is none.

        `again` says that sending it twice does no harm: a service that answered before and is away now is waited for.
        """
        sent = {name: value for name, value in (params or {}).items() if value is not None}
        away_since = None
        while True:
            try:
                response = self._http.request(method, path, params=sent, json=body, content=content, headers=headers)
                raise_for_problem(response)
            except (httpx.TransportError, ApiProblem) as error:
                if isinstance(error, ApiProblem):
                    self._has_answered = True
                away_since = away_since or time.monotonic()
                if not again or not self._waits(error, away_since):
                    raise self._explain(error) from error
                time.sleep(RECONNECT_SECONDS)
                continue
            self._has_answered = True
            return response

    def _waits(self, error: httpx.TransportError | ApiProblem, away_since: float) -> bool:
        passing = isinstance(error, httpx.TransportError) or error.is_passing
        return passing and self._has_answered and time.monotonic() - away_since < PATIENCE_SECONDS

    def _explain(self, error: httpx.TransportError | ApiProblem) -> Exception:
        if isinstance(error, ApiProblem):
            return error
        if isinstance(error, httpx.ConnectError) and not self._has_answered:
            return NotReachable(f"nothing answers at {self.url}; start the service with `noisy-student up`, or give --url")
        return NotReachable(f"{self.url} stopped answering: {error or type(error).__name__}")

    def get(self, path: str, **params: Any) -> Any:
        """Read a resource."""
        return self.request("GET", path, params=params, again=True).json()

    def post(self, path: str, body: Any = None, **params: Any) -> Any:
        """Start or change something, once: the same Idempotency-Key goes with every try."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        response = self.request("POST", path, params=params, body={} if body is None else body, headers=headers, again=True)
        return response.json()

    def delete(self, path: str) -> None:
        """Remove a resource."""
        self.request("DELETE", path)

    def pages(self, path: str, *, most: int | None = None, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, or the newest `most` of them, page after page."""
        sent: dict[str, Any] = {"limit": min(most or 200, 200), **params}
        count = 0
        while True:
            page = self.get(path, **sent)
            for item in page["items"]:
                yield item
                count += 1
                if most is not None and count >= most:
                    return
            if page.get("next_cursor") is None:
                return
            sent["cursor"] = page["next_cursor"]

    def wait_for_job(self, job_id: str, on_change: JobListener | None = None) -> dict[str, Any]:
        """Hold on until the job ended; JobFailed unless it succeeded. `on_change` sees the job about every second."""
        wait = "wait=1" if on_change else "wait=20"
        while True:
            job: dict[str, Any] = self.request("GET", f"{API}/jobs/{job_id}", headers={"Prefer": wait}, again=True).json()
            if on_change is not None:
                on_change(job)
            if job["status"] == "succeeded":
                return job
            if job["status"] in TERMINAL:
                raise JobFailed(job)

    def follow(self, path: str, *, after: int = 0) -> Iterator[StreamEvent]:
        """Events of a job or run above number `after`, live, each exactly once, until the event `end`.

        A cut connection is opened again with Last-Event-ID; NotReachable when the service stays away for PATIENCE_SECONDS.
        """
        last, away_since = after, None
        while True:
            try:
                with self._open_stream(path, last) as response:
                    away_since = None
                    for event in _events(response.iter_lines()):
                        # What comes twice (a replaying proxy) is dropped here.
                        if event.number is not None and event.number <= last:
                            continue
                        last = last if event.number is None else event.number
                        yield event
                        if event.kind == "end":
                            return
            except (httpx.TransportError, ApiProblem) as error:
                # Every refusal but those of a service that is starting again is final.
                if isinstance(error, ApiProblem) and error.status not in (502, 503, 504):
                    raise
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > PATIENCE_SECONDS:
                    raise NotReachable(f"{self.url} did not come back within {PATIENCE_SECONDS:.0f} s") from error
            time.sleep(RECONNECT_SECONDS)

    @contextmanager
    def _open_stream(self, path: str, after: int) -> Iterator[httpx.Response]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._http.stream("GET", path, headers=headers, timeout=STREAM_TIMEOUT) as response:
            if response.is_error:
                response.read()
            raise_for_problem(response)
            yield response


def _events(lines: Iterator[str]) -> Iterator[StreamEvent]:
    """Parse server-sent events; comments and `retry` fields are passed over."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" and "data" in fields else value
            continue
        if "data" in fields:
            number = int(fields["id"]) if "id" in fields else None
            yield StreamEvent(number, fields.get("event", "message"), json.loads(fields["data"]))
        fields = {}


def is_loopback(url: str) -> bool:
    """Whether the address is this machine's own."""
    host = httpx.URL(url).host
    return host in ("localhost", "::1") or host.startswith("127.")


def raise_for_problem(response: httpx.Response) -> None:
    """ApiProblem unless the answer is a success."""
    if response.is_success:
        return
    try:
        body = response.json()
    except ValueError:
        body = None
    # A proxy, or something else on that port, answers in its own words.
    raise ApiProblem(
        response.status_code, body if isinstance(body, dict) else {"detail": f"HTTP {response.status_code}: {response.text[:200]}"}
    )
