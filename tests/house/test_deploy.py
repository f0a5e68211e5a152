"""The Compose file read as data, and turned into processes of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.settings import Settings
from deploy.__main__ import main
from deploy.compose_file import MissingVariable, fill_in, read_services
from deploy.fleet import Fleet, FleetFailed
from deploy.loopback import CONTAINER_PORTS, Loopback

VARIABLES = {"POSTGRES_PASSWORD": "0123abcd", "STORAGE_URL": "s3://noisy-student", "S3_ENDPOINT_URL": "http://storage:9000"}


@pytest.mark.parametrize(
    ("text", "filled"),
    [("${A}", "a"), ("${B:-b}", "b"), ("${A:-b}", "a"), ("$$A", "$A"), ("x${EMPTY:-e}y", "xey"), ("${UNKNOWN}", "")],
)
def test_variables_are_filled_in_as_compose_does(text: str, filled: str) -> None:
    assert fill_in([text], {"A": "a", "EMPTY": ""}) == [filled]


def test_a_variable_that_must_be_set_is_asked_for() -> None:
    with pytest.raises(MissingVariable, match="POSTGRES_PASSWORD"):
        read_services({})


def test_a_profile_brings_its_services_and_no_others() -> None:
    assert "storage" not in read_services(VARIABLES)
    assert set(read_services(VARIABLES, profiles=["s3"])) - set(read_services(VARIABLES)) == {"storage"}


def make_place(directory: Path) -> Loopback:
    return Loopback(directory, {"api": 2, "worker": 3}, shares_data=False, ports={name: 1000 + n for n, name in enumerate(CONTAINER_PORTS)})


def test_a_process_gets_the_containers_environment_with_addresses_of_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    service = read_services(VARIABLES, profiles=["s3"])["api"]

    start = place.start(service, "api-2")

    assert set(start.environment) == set(service.environment)
    for name, value in start.environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.resolved_database_url == "postgresql+psycopg://noisy_student:0123abcd@127.0.0.1:1000/noisy_student"
    assert settings.redis_url == "redis://127.0.0.1:1001/0"
    assert settings.s3_endpoint_url == "http://127.0.0.1:1002"
    assert (settings.host, settings.port) == ("127.0.0.1", place.port("api-2"))
    assert settings.data_directory == tmp_path / "hosts" / "api-2"
    assert start.command == [sys.executable, "-m", "server"]


def test_a_fleets_cluster_does_not_outlive_the_directory_that_knows_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "fleet"
    place = Loopback(directory, {}, shares_data=False)
    (place.postgres / "left").mkdir(parents=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.__main__.read_services", lambda *_args, **_options: {})
        patch.setattr(Fleet, "start", lambda _self: (_ for _ in ()).throw(FleetFailed("far enough")))
        code = main(["--directory", str(directory)])

    assert code == 2
    assert "far enough" in capsys.readouterr().err
    assert not place.postgres.exists()


def test_one_worker_may_have_more_slots_than_the_others(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.slots = {"worker-3": 2}
    service = read_services(VARIABLES)["worker"]

    slots = [place.start(service, name).environment["NOISY_STUDENT_SLOTS"] for name in place.names("worker")]

    assert slots == ["1", "1", "2"]


def test_a_health_check_asks_its_own_process(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    check = place.health_check(read_services(VARIABLES)["api"], "api-1")

    assert check is not None
    assert f"http://127.0.0.1:{place.port('api-1')}/readyz" in check.command[-1]


def test_the_proxy_knows_every_replica_and_nobody_else(tmp_path: Path) -> None:
    place = make_place(tmp_path)

    start = place.start(read_services(VARIABLES)["proxy"], "proxy")

    lines = [line.split() for line in Path(start.command[-1]).read_text(encoding="utf-8").splitlines()]
    servers = {words[2] for words in lines if words[:1] == ["server"]}
    assert servers == {f"127.0.0.1:{place.port(name)}" for name in ("api-1", "api-2", "predictor")}
    assert ["bind", f"127.0.0.1:{place.port('proxy')}"] in lines


def test_each_worker_has_a_name_of_its_own(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    service = read_services(VARIABLES)["worker"]

    commands = [place.start(service, name).command for name in place.names("worker")]

    assert [command[-1] for command in commands] == ["worker-1@%h", "worker-2@%h", "worker-3@%h"]
    assert [command[-3:-2] for command in commands] == [["cpu"]] * 3
