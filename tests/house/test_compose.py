"""Every command, module, variable, path and health check of docker-compose.yml and the Dockerfile exists in the code."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from core.settings import Settings
from deploy.compose_file import fill_in
from server.app import create_app, create_predictor
from tests.architecture.sources import REPOSITORY

COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
PREFIX = "NOISY_STUDENT_"


@dataclass
class Stage:
    """One `FROM … AS name` of the Dockerfile with its instructions."""

    name: str
    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def values(self, word: str) -> list[str]:
        return [value for instruction, value in self.instructions if instruction == word]


def read_dockerfile() -> dict[str, Stage]:
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    stages: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, lines)):
        word, value = line.split(None, 1)
        if word == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", value).groups()  # type: ignore[union-attr]
            stages[name] = Stage(name, parent)
        elif stages:
            list(stages.values())[-1].instructions.append((word, value))
    return stages


STAGES = read_dockerfile()


def commands() -> dict[str, list[str]]:
    """Every command that Compose or an image starts, by where it stands."""
    found = {f"compose {name}": service["command"] for name, service in OURS.items()}
    for stage in STAGES.values():
        found |= {f"image {stage.name}": json.loads(value) for value in stage.values("CMD")}
    return found


@pytest.mark.parametrize("place", commands())
def test_every_command_exists(place: str) -> None:
    command = commands()[place]

    assert_command_exists(command)


def assert_command_exists(command: list[str]) -> None:
    if command[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(f"{command[2]}.__main__") is not None
    elif command[0] == "noisy-student":
        script = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]["noisy-student"]
        module, _, name = script.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert command[1] in get_command(importlib.import_module(module).app).commands  # type: ignore[attr-defined]
    elif command[0] == "celery":
        assert command[1:4:2] == ["-A", "worker"]
        assert command[4] == "-Q"
        assert importlib.util.find_spec(command[2]) is not None
    else:
        raise AssertionError(f"nobody knows {shlex.join(command)}")


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    """What the container sees: the image's ENV, then Compose's, with the shell's variables filled in."""
    merged: dict[str, str] = {}
    for stage in chain(service["build"]["target"]):
        for value in stage.values("ENV"):
            merged |= dict(part.split("=", 1) for part in shlex.split(value))
    merged |= service.get("environment", {})
    return {name: fill_in(value, {"POSTGRES_PASSWORD": "0123abcd"}) for name, value in merged.items()}


def chain(target: str) -> list[Stage]:
    """A stage's ancestors and itself, oldest first."""
    stage = STAGES[target]
    return [*(chain(stage.parent) if stage.parent in STAGES else []), stage]


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_with_a_value_that_it_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {key: value for key, value in environment_of(OURS[name]).items() if key.startswith(PREFIX)}
    for key, value in ours.items():
        monkeypatch.setenv(key, value)

    settings = Settings()

    assert {key for key in ours if key.removeprefix(PREFIX).lower() not in Settings.model_fields} == set()
    assert settings.resolved_database_url == "postgresql+psycopg://noisy_student:0123abcd@postgres:5432/noisy_student"
    assert settings.redis_url == "redis://redis:6379/0"
    assert settings.require_keys


@pytest.mark.parametrize("name", OURS)
def test_data_lies_in_a_volume_and_datasets_are_read_only(name: str) -> None:
    environment = environment_of(OURS[name])
    mounts = dict(re.fullmatch(r"(.+?):(/[^:]*(?::ro)?)", mount).groups() for mount in OURS[name]["volumes"])  # type: ignore[union-attr]

    assert mounts["data"] == environment[f"{PREFIX}DATA_DIRECTORY"]
    if name != "migrate":
        assert f"{environment[f'{PREFIX}DATASET_ROOTS']}:ro" in mounts.values()


def test_every_named_volume_is_declared_and_every_declared_one_used() -> None:
    used = {mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", []) if re.match(r"\w+:", mount)}

    assert used == set(COMPOSE["volumes"])


@pytest.mark.parametrize("name", [name for name in OURS if "celery" in OURS[name]["command"]])
def test_a_worker_consumes_a_known_queue_and_may_finish_its_checkpoint(name: str) -> None:
    service = OURS[name]
    environment = environment_of(service)
    queues = service["command"][service["command"].index("-Q") + 1].split(",")

    assert set(queues) <= {"cpu", "cuda"}
    assert int(service["stop_grace_period"].removesuffix("s")) > float(environment[f"{PREFIX}GRACE_SECONDS"])


@pytest.mark.parametrize("name", ["api", "predictor"])
def test_the_health_check_asks_a_route_that_exists_on_the_port_that_the_process_has(name: str, tmp_path: Path) -> None:
    [from_image] = STAGES[name].values("HEALTHCHECK")
    compose_test = SERVICES[name]["healthcheck"]["test"]
    port = environment_of(SERVICES[name])[f"{PREFIX}PORT"]
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", compose_test[-1])

    assert url is not None
    assert url[0] in from_image
    assert url[1] == port == STAGES[name].values("EXPOSE")[0]
    make_app = create_predictor if name == "predictor" else create_app
    assert url[2] in make_app(Settings(data_directory=tmp_path)).openapi()["paths"]


@pytest.mark.parametrize("name", ["worker", "worker-cuda"])
def test_the_health_check_of_a_worker_exists(name: str) -> None:
    test = SERVICES[name]["healthcheck"]["test"]

    assert test[0] == "CMD"
    assert_command_exists(test[1:])
    assert json.dumps(test[1:]) in STAGES["worker"].values("HEALTHCHECK")[0]


def test_the_proxy_sends_to_the_ports_that_the_replicas_listen_on() -> None:
    text = (REPOSITORY / "deploy/haproxy.cfg").read_text(encoding="utf-8")
    targets = dict(re.findall(r"server-template \w+ \d+ (\w+):(\d+)", text))

    assert targets == {name: environment_of(SERVICES[name])[f"{PREFIX}PORT"] for name in ("api", "predictor")}
    assert re.findall(r"(?m)^    bind :(\d+)", text) == [mapping.rpartition(":")[2] for mapping in SERVICES["proxy"]["ports"]]
    assert "uri /readyz" in text
    [mount] = SERVICES["proxy"]["volumes"]
    assert (REPOSITORY / mount.split(":")[0]).is_file()
    assert mount.split(":")[1] == SERVICES["proxy"]["command"][-1]
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]


def test_everything_waits_for_a_healthy_database_and_finished_migrations() -> None:
    for name, service in OURS.items():
        needed = service["depends_on"]
        if name == "migrate":
            assert needed == {"postgres": {"condition": "service_healthy"}}
        else:
            assert needed["migrate"] == {"condition": "service_completed_successfully"}
            assert needed["redis"] == {"condition": "service_healthy"}
    assert {name for name in ("postgres", "redis", "api") if "healthcheck" not in SERVICES[name]} == set()


def test_no_secret_stands_in_the_file() -> None:
    text = (REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8")

    assert re.findall(r"(?im)^\s*\w*(?:password|secret|token|api_key)\w*:[ ]*(?!\$\{\w+:(?:\?|-\}))\S+", text) == []
    assert re.findall(r"://\w+:(?!\$\{\w+:\?)[^@/\s]+@", text) == []


@pytest.mark.parametrize("target", sorted({service["build"]["target"] for service in OURS.values()}))
def test_an_image_ends_as_a_user_who_is_not_root(target: str) -> None:
    users = [user for stage in chain(target) for user in stage.values("USER")]

    assert users[-1] not in {"root", "0"}
    assert any(users[-1] in command for stage in chain(target) for command in stage.values("RUN") if "useradd" in command)


@pytest.mark.parametrize(("target", "lock"), [("api", "api"), ("predictor", "api"), ("worker-cpu", "worker"), ("worker-cuda", "worker")])
def test_an_image_installs_its_own_lock_by_hash(target: str, lock: str) -> None:
    stages = chain(target)

    copied = [value.split()[0] for stage in stages for value in stage.values("COPY") if value.startswith("requirements/")]
    assert copied == [f"requirements/{lock}.txt"]
    assert any("pip install --require-hashes" in value for stage in stages for value in stage.values("RUN"))


def test_everything_that_is_copied_exists_and_is_let_through_to_the_build() -> None:
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")]
    sources = [
        source
        for stage in STAGES.values()
        for value in stage.values("COPY")
        if not value.startswith("--from=")
        for source in value.split()[:-1]
    ]

    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert [
        source
        for source in sources
        if source not in allowed and not ("requirements/*.txt" in allowed and source.startswith("requirements/"))
    ] == []


def test_every_package_of_the_distribution_is_copied() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = {pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = {source for value in STAGES["wheel"].values("COPY") for source in value.split()[:-1]}

    assert rooms <= copied
    assert project["project"]["readme"] in copied
