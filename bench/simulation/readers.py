"""What people and programs ask the API all the while: one connection, one read after the other."""

from __future__ import annotations

import threading

import httpx
import sqlalchemy as sa

from bench.simulation.plan import Notes
from bench.simulation.scene import Scene
from core.db.tables import Job


class Reader(threading.Thread):
    """Reads every path in turn until it is stopped."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(name="reader")
        self._scene = scene
        self.notes = Notes()
        self.stop = threading.Event()

    def run(self) -> None:
        headers = {"Authorization": f"Bearer {self._scene.service.key}"}
        with httpx.Client(base_url=self._scene.service.url, headers=headers, timeout=60) as client:
            paths = self._paths(None)
            while not self.stop.is_set():
                if len(paths) < len(self._paths("")):
                    paths = self._paths(self._scene.set_id())
                for name, path in paths.items():
                    try:
                        with self.notes.timed(name):
                            status = client.get(path).status_code
                        found = "" if status == httpx.codes.OK else str(status)
                    except httpx.HTTPError as error:
                        found = repr(error)
                    if found:
                        self.notes.errors.append(f"{path} answered {found}")
                    if self.stop.wait(self._scene.shared.plan.read_pause_seconds):
                        return

    def _paths(self, set_id: str | None) -> dict[str, str]:
        """By what is read; those of the set only when there is one."""
        run = f"/api/v1/runs/{self._scene.run_id}"
        job = f"/api/v1/jobs/{self._first_job()}"
        paths = {
            "jobs": "/api/v1/jobs",
            "jobs that wait": "/api/v1/jobs?status=queued",
            "jobs that run": "/api/v1/jobs?status=running",
            "jobs of the run": f"/api/v1/jobs?run_id={self._scene.run_id}",
            "job": job,
            "events": f"{job}/events?after=0",
            "runs": "/api/v1/runs",
            "run": run,
            "iterations": f"{run}/iterations",
            "lineage": f"{run}/lineage",
            "run's events": f"{run}/events?after=0",
            "generations": "/api/v1/generations",
            "sets": "/api/v1/pseudo-label-sets",
            "queues": "/api/v1/queues",
            "workers": "/api/v1/workers",
            "metrics": "/metrics",
        }
        return paths if set_id is None else paths | {"set": f"/api/v1/pseudo-label-sets/{set_id}"}

    def _first_job(self) -> str:
        with self._scene.database.reading() as session:
            return session.scalars(sa.select(Job.id).where(Job.run_id == self._scene.run_id).order_by(Job.id).limit(1)).one()
