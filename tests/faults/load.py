"""What clients want of the service while faults come and go: readings, splits, labels, runs, cancellations, promotions, predictions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from PIL import Image

from tests.faults.ledger import Accepted, Ledger, Move
from tests.faults.stage import Stage, chance
from tests.ml.builders_images import encode, write_class_folders, write_flat_folder

API = "/api/v1"
NUM_FOLDERS = 4
NUM_POOL = 24
NUM_POISON = 400
SHARD_SIZE = 8
MOST_OPEN = 5
LABEL_SECONDS = 45.0
"""Between two sets: each of their jobs may have to load torch."""
RED = encode(Image.new("RGB", (20, 10), (250, 20, 10)))
RUNTIME = {"num_threads": 1, "num_loader_workers": 0}
TRAINING = {"batch_size": 18, "evaluate_every_steps": 200, "ema_decay": 0.9, "checkpoint_every_seconds": 0.5}
RECIPE = {
    "teacher": {"training": {"steps": 1500, **TRAINING}},
    "students": [{"training": {"steps": 200, **TRAINING, "batch_size": 6}}],
    "labeling": {"shard_size": SHARD_SIZE},
    "selection": {"require_every_class": False, "near_duplicate_distance": None},
    "iterations": {"control": False},
    "runtime": RUNTIME,
}


class Refused(Exception):
    """A definite answer that is not the one that was hoped for."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"{response.status_code} {response.text[:500]}")
        self.response = response


@dataclass(slots=True)
class Wants:
    """What there is to work with."""

    generations: list[str] = field(default_factory=list)
    """Served ones, which disagree about red."""
    labels: dict[str, str] = field(default_factory=dict)
    """What each of them takes red for."""
    teacher: str | None = None
    """One that can label; without it there are neither sets nor runs."""


class Load:
    """Threads that behave like careful clients: whatever is not answered is asked again with the same key."""

    def __init__(self, stage: Stage, ledger: Ledger, wants: Wants) -> None:
        self.stage = stage
        self.ledger = ledger
        self.wants = wants
        self.ready: list[str] = []
        """Labeled datasets that can be split."""
        self.run: Accepted | None = None
        self._chance = chance(stage.seed, stage.kind, "load")
        self._labeled_at = float("-inf")
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(loop,)) for loop in (self._ask, self._predict, self._promote)]

    def write_images(self) -> None:
        """Folders to read; no picture is in two of them."""
        images = self.stage.images
        for number in range(NUM_FOLDERS):
            write_class_folders(images / f"labeled-{number}", {"cat": 3, "dog": 3}, first=100 * number, size=16)
            write_flat_folder(images / f"flat-{number}", 6, first=5000 + 100 * number, size=16)
        # So many that an attempt can be met in the middle.
        write_flat_folder(images / "poison", NUM_POISON, first=60_000, size=16)
        classes = {"blue": 12, "green": 12, "red": 12}
        write_class_folders(images / "run-labeled", classes, first=20_000)
        write_class_folders(images / "run-test", dict.fromkeys(classes, 8), first=30_000)
        write_flat_folder(images / "run-pool", NUM_POOL, first=40_000, num_hues=3)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No new wishes; those that were sent are asked until they are answered."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except Exception as error:  # a thread that dies in silence would make of a defect a quiet run
            self.ledger.complain(f"the load's {loop.__name__} ended: {type(error).__name__}: {error}")
            raise

    # Asking, as a client should

    def ask(self, noun: str, path: str, body: Any, *, wanted: int = 202) -> Accepted:
        """Send until there is a definite answer; Refused when it is another than `wanted`."""
        key, sent = uuid4().hex, 0
        self.ledger.keys.add(key)
        while True:
            sent += 1
            response = self._send("POST", path, body, {"Idempotency-Key": key})
            if response is not None and response.status_code < 500 and response.status_code != 429:
                break
            time.sleep(0.2)
        if response.status_code != wanted:
            self.ledger.keys.discard(key)
            raise Refused(response)
        one = self.ledger.accept(Accepted(key, noun, response.json()["id"], response.json(), sent))
        if self._chance.random() < 0.3:
            again = self._send("POST", path, body, {"Idempotency-Key": key})
            one.sent += 1
            if again is not None and again.status_code < 500 and again.json().get("id") != one.id:
                self.ledger.complain(f"key {key} was answered with {one.id} and then with {again.status_code} {again.text[:200]}")
        return one

    def _send(self, method: str, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response | None:
        """None when no answer came."""
        with suppress(httpx.TransportError), self.stage.client() as client:
            response = client.request(method, path, json=body, headers=headers)
            if response.status_code == 500:
                # A fault is no surprise: the service has a name for everything that it cannot do just now.
                self.ledger.complain(f"{method} {path} was answered with {response.text[:300]}")
            return response
        return None

    # Jobs

    def read_folder(self, name: str, kind: str, folder: Path) -> Accepted:
        """A new dataset."""
        body = {"name": name, "kind": kind, "source": {"folder": str(folder)}}
        one = self.ask("ingest", f"{API}/datasets", body)
        self.ledger.versions_wanted[name] = 1
        return one

    def cancel(self, one: Accepted) -> None:
        """Wish it canceled, whether or not it has ended meanwhile."""
        one.cancel_asked = True
        self._send("POST", f"{API}/jobs/{one.id}/cancel", {})

    def add_dataset(self, number: int) -> Accepted:
        """A small folder as a new dataset, labeled or not."""
        labeled = self._chance.random() < 0.7
        name, place = f"data-{number}", self._chance.randrange(NUM_FOLDERS)
        folder = self.stage.images / (f"labeled-{place}" if labeled else f"flat-{place}")
        one = self.read_folder(name, "labeled" if labeled else "unlabeled", folder)
        if labeled:
            self.ready.append(name)
        return one

    def add_version(self) -> Accepted | None:
        """Another reading of a dataset."""
        if not self.ready:
            return None
        name = self._chance.choice(self.ready)
        source = {"source": {"folder": str(self.stage.images / f"labeled-{self._chance.randrange(NUM_FOLDERS)}")}}
        one = self.ask("ingest", f"{API}/datasets/{name}/versions", source)
        self.ledger.versions_wanted[name] += 1
        return one

    def split(self, number: int, *, dataset: str | None = None) -> Accepted | None:
        """Cut a dataset in two; None while its newest version is not ready."""
        if not self.ready and dataset is None:
            return None
        name, prefix = dataset or self._chance.choice(self.ready), f"split-{number}"
        body = {"shares": {"labeled": 0.5, "unlabeled": "rest"}, "name_prefix": prefix}
        try:
            one = self.ask("split", f"{API}/datasets/{name}/splits", body)
        except Refused as refused:
            if refused.response.status_code == 409:
                return None
            raise
        self.ledger.versions_wanted |= {f"{prefix}-labeled": 1, f"{prefix}-unlabeled": 1}
        return one

    def split_a_new_one(self, number: int) -> None:
        """A dataset of its own, with images that no other has, cut in two as soon as it has been read."""
        name, folder = f"data-{number}", self.stage.images / f"new-{number}"
        write_class_folders(folder, {"cat": 3, "dog": 3}, first=number, size=16)
        self.read_folder(name, "labeled", folder)
        deadline = time.monotonic() + 20
        while self.split(number, dataset=name) is None and time.monotonic() < deadline:
            time.sleep(0.2)

    def label_pool(self) -> Accepted | None:
        """The pool's shards, labeled by the teacher, then a selection."""
        if self.wants.teacher is None:
            return None
        body = {
            "generation": self.wants.teacher,
            "unlabeled": "run-pool",
            "labeling": {"shard_size": SHARD_SIZE},
            "selection": {**RECIPE["selection"], "min_confidence": 0.0},  # type: ignore[dict-item]
            "runtime": RUNTIME,
            # Labels that are taken over give a fault no labeling to fall into.
            "reuse": self._chance.random() < 0.25,
        }
        return self.ask("set", f"{API}/pseudo-label-sets", body)

    def start_run(self) -> Accepted:
        """A teacher, its labels, a student."""
        datasets = {"labeled": "run-labeled", "unlabeled": "run-pool", "test": "run-test"}
        body = {"name": "chaos", "datasets": datasets, "preset": "digits", "recipe": RECIPE, "iterations": 1}
        self.run = self.ask("run", f"{API}/runs", body)
        return self.run

    def _ask(self) -> None:
        number, pace = 0, 0.2
        while not self._over.wait(pace):
            waiting = self.stage.count_open()
            if waiting is None or waiting >= MOST_OPEN:
                continue
            number += 1
            draw = self._chance.random()
            one = self._draw(draw, number)
            if one is not None and one.noun != "set" and self._chance.random() < 0.08:
                self._over.wait(self._chance.random())
                self.cancel(one)

    def _draw(self, draw: float, number: int) -> Accepted | None:
        if draw < 0.45:
            return self.add_dataset(number)
        if draw < 0.7:
            return self.add_version()
        if draw < 0.92:
            return self.split(number)
        if time.monotonic() - self._labeled_at < LABEL_SECONDS:
            return self.add_version()
        self._labeled_at = time.monotonic()
        return self.label_pool()

    # Serving

    def _predict(self) -> None:
        while not self._over.wait(0.1):
            self.predict_once()

    def predict_once(self) -> int | None:
        """Ask what is in a red image; the answer must be that of the generation that it names."""
        try:
            with self.stage.client(timeout=10) as client:
                response = client.post("/predict", content=RED)
        except httpx.TransportError:
            self.ledger.count_prediction("unreachable")
            return None
        self.ledger.count_prediction(str(response.status_code))
        if response.status_code == 200:
            answer = response.json()
            if self.wants.labels.get(answer["generation_id"]) != answer["label"]:
                self.ledger.complain(f"/predict answered {answer['label']} in the name of {answer['generation_id']}")
        elif response.status_code <= 500:
            self.ledger.complain(f"/predict answered {response.status_code} {response.text[:300]}")
        return response.status_code

    def _promote(self) -> None:
        while not self._over.wait(1.5):
            self.promote_once()

    def promote_once(self) -> int | None:
        """Move the alias to the other generation; the status, None when no answer came."""
        seen = self._send("GET", f"{API}/aliases/production", None)
        if seen is None or seen.status_code not in (200, 404):
            return None if seen is None else seen.status_code
        headers = {"If-None-Match": "*"} if seen.status_code == 404 else {"If-Match": seen.headers["etag"]}
        now = None if seen.status_code == 404 else seen.json()["generation_id"]
        wanted = next(one for one in self.wants.generations if one != now)
        moved = self._send("PUT", f"{API}/aliases/production", {"generation": wanted}, headers)
        if moved is None:
            return None
        if moved.status_code == 200:
            with self.ledger.lock:
                self.ledger.moves.append(Move(moved.json()["version"], moved.json()["generation_id"]))
        elif moved.status_code < 500 and moved.status_code != 412:
            self.ledger.complain(f"a promotion was answered with {moved.status_code} {moved.text[:300]}")
        return moved.status_code
