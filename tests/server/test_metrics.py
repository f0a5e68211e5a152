"""/metrics: what was asked, and what the rows hold."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from core.db.tables import Job
from server.counted import Counted
from tests.server.builders import Api, add_job, add_worker, api_in_process, start_job


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with api_in_process(tmp_path) as running:
        yield running


def read(api: Api) -> dict[str, float]:
    """Value by name with labels."""
    lines = [line for line in api.client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_requests_are_counted_by_route_and_not_by_address(api: Api) -> None:
    for name in ("one", "two", "three"):
        assert api.client.get(f"/api/v1/jobs/{name}").status_code == 404

    found = {name: value for name, value in read(api).items() if name.startswith("noisy_student_requests_total") and "jobs" in name}

    assert found == {'noisy_student_requests_total{method="GET",route="/api/v1/jobs/{job_id}",status="404"}': 3.0}


def test_jobs_are_counted_by_status_and_the_oldest_that_waits_has_its_age(api: Api) -> None:
    assert read(api)["noisy_student_oldest_queued_seconds"] == 0
    start_job(api.database, add_job(api.database).id)
    waiting = add_job(api.database)
    add_worker(api.database)
    with api.database.transaction() as session:
        session.execute(sa.update(Job).where(Job.id == waiting.id).values(created_at=waiting.created_at - timedelta(hours=1)))

    found = read(api)

    assert found['noisy_student_jobs{status="queued"}'] == 1
    assert found['noisy_student_jobs{status="running"}'] == 1
    assert found["noisy_student_workers"] == 1
    assert found["noisy_student_outbox"] == 2, "a hint for each job"
    assert 3600 <= found["noisy_student_oldest_queued_seconds"] < 3700


def test_an_image_that_waits_is_counted(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = api.services.serving.predictor
    let_go = threading.Event()
    monkeypatch.setattr(predictor, "_answer", lambda *_: let_go.wait(20))

    [future] = predictor.submit([b"image"], None)  # type: ignore[arg-type]

    assert read(api)["noisy_student_predict_images"] == 1
    let_go.set()
    future.result()
    assert read(api)["noisy_student_predict_images"] == 0


def test_what_took_long_to_count_is_shown_again() -> None:
    moment = 0.0
    counts: Counted[int] = Counted(clock=lambda: moment)
    counted: list[int] = []

    def count() -> int:
        nonlocal moment
        moment += 0.1 if len(counted) else 0.001
        counted.append(len(counted))
        return counted[-1]

    def read_at(at: float) -> int:
        nonlocal moment
        moment = at
        return counts.read(count)

    assert [read_at(at) for at in (0, 1, 2, 5, 7)] == [0, 1, 1, 1, 2]
