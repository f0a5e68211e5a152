"""One call of the command line: its global options, and the service they lead to."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import typer

from cli.client import Client, is_loopback
from cli.output import Output
from core.settings import Settings

URL_VARIABLE = "NOISY_STUDENT_URL"
KEY_VARIABLE = "NOISY_STUDENT_API_KEY"
DATA_DIRECTORY_VARIABLE = "NOISY_STUDENT_DATA_DIRECTORY"


@dataclass
class Invocation:
    """What every verb gets to know."""

    url: str | None
    key: str | None
    output: Output

    @cached_property
    def settings(self) -> Settings:
        """The environment's settings; `--data-directory` was put into the environment before."""
        return Settings()

    @cached_property
    def client(self) -> Client:
        """A client that found address and key by itself."""
        url, given = find_url(self.url, self.settings)
        # The data directory's key opens this machine's service; it is not sent to whatever address somebody names.
        may_use_file = not given or is_loopback(url)
        return Client(url, self.key or os.environ.get(KEY_VARIABLE) or (find_key(self.settings) if may_use_file else None))

    def close(self) -> None:
        """Hang up, if the service was called at all."""
        if "client" in self.__dict__:
            self.client.close()


def get_invocation(context: typer.Context) -> Invocation:
    """The call that a verb belongs to."""
    invocation = context.obj
    assert isinstance(invocation, Invocation)
    return invocation


def find_url(given: str | None, settings: Settings) -> tuple[str, bool]:
    """The service's address, and whether a person named it: option, variable, the running `up`, the settings' host and port."""
    named = given or os.environ.get(URL_VARIABLE)
    if named:
        return (named if "://" in named else f"http://{named}"), True
    service = read_service_file(settings.service_file)
    return (service["url"] if service else local_url(settings)), False


def local_url(settings: Settings) -> str:
    """Where a service with these settings is reached from this machine."""
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  addresses to listen on, turned into ones to call
    host = anywhere.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def read_service_file(path: Path) -> dict[str, str] | None:
    """What the running `up` left there: {url, pid}; None when it is not there or not readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("url"), str) else None


def find_key(settings: Settings) -> str | None:
    """The first admin key, where this user may read it."""
    try:
        return settings.key_file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
