"""docker-compose.yml as data: commands, environments and health checks, with the shell's variables filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COMPOSE_FILE = Path(__file__).resolve().parent.parent / "docker-compose.yml"

_VARIABLE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<word>[^}]*))?\}")


class MissingVariable(Exception):
    """The file asks for a variable that is not set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComposeService:
    """What Compose would start as one container."""

    name: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    health_check: tuple[str, ...] | None
    """Its command; None when the file has none, or one that only a shell of the image understands."""
    needs: dict[str, str]
    """Service → what must be true of it first: `service_healthy` or `service_completed_successfully`."""
    restart: bool
    stop_grace_seconds: float


def read_services(variables: Mapping[str, str], *, profiles: Sequence[str] = (), path: Path = COMPOSE_FILE) -> dict[str, ComposeService]:
    """The services of the file that these profiles start; MissingVariable when one of them needs what `variables` has not."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["services"]
    wanted = {name: service for name, service in found.items() if not service.get("profiles") or set(service["profiles"]) & set(profiles)}
    return {name: _read(name, fill_in(service, variables)) for name, service in wanted.items()}


def fill_in(value: Any, variables: Mapping[str, str]) -> Any:
    """`${NAME}`, `${NAME:-default}`, `${NAME:?message}` and `$$` in every string of a nested value."""
    if isinstance(value, dict):
        return {key: fill_in(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill_in(inner, variables) for inner in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        given = variables.get(match["name"], "")
        if not given and match["kind"] == "?":
            raise MissingVariable(f"{match['name']}: {match['word']}")
        return given or (match["word"] if match["kind"] == "-" else "")

    return _VARIABLE.sub(replace, value)


def _read(name: str, service: dict[str, Any]) -> ComposeService:
    test = service.get("healthcheck", {}).get("test", [])
    needs = {other: wanted["condition"] for other, wanted in service.get("depends_on", {}).items()}
    return ComposeService(
        name=name,
        entrypoint=tuple(service.get("entrypoint", ())),
        command=tuple(service.get("command", ())),
        environment={key: str(value) for key, value in service.get("environment", {}).items()},
        health_check=tuple(test[1:]) if test[:1] == ["CMD"] else None,
        needs=needs,
        restart=service.get("restart") == "unless-stopped",
        stop_grace_seconds=float(service.get("stop_grace_period", "10s").removesuffix("s")),
    )
