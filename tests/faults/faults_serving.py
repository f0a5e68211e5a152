"""Promotions and predictions: in a row, killed in the middle, of a network that cannot be served, and five times too many."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
from PIL import Image

from tests.builders_services import wait_until
from tests.faults.fault import Fault, NotNoticed, NotNow, Scene
from tests.faults.load import API
from tests.ml.builders_images import encode

MOVES = 6
ASKERS = 5 * 8
"""Five times as many images at once as the queue of a chaos run holds."""
DEADLINE_SECONDS = 10.0
SIDE = 3000
"""Pixels: decoding it keeps a core busy for a moment."""


class PromotionsInARow(Fault):
    """The alias moves as fast as it can under load: no prediction fails, and each is its generation's own."""

    name, concerns = "promotions in a row", "promotion"

    def strike(self, scene: Scene) -> dict[str, Any]:
        if scene.load.predict_once() != 200:
            raise NotNow("nothing is served")
        over, statuses = threading.Event(), []

        def ask() -> None:
            while not over.is_set():
                statuses.append(scene.load.predict_once())

        thread = threading.Thread(target=ask)
        thread.start()
        moved = [scene.load.promote_once() for _ in range(MOVES)]
        over.set()
        thread.join()
        if set(statuses) != {200}:
            raise NotNoticed(f"while the alias moved, /predict answered {sorted(set(map(str, statuses)))}")
        return {"moves": moved.count(200), "predictions": len(statuses)}


class PromotionKilled(Fault):
    """SIGKILL of the API while an alias moves: afterwards it points at one of the two, and its history says which."""

    name, concerns = "promotion killed", "promotion"

    def strike(self, scene: Scene) -> dict[str, Any]:
        thread = threading.Thread(target=scene.load.promote_once)
        thread.start()
        time.sleep(scene.chance.uniform(0.0, 0.15))
        scene.stage.members.api.kill()
        thread.join()
        return {}


class WarmUpFails(Fault):
    """A generation that cannot be served is promoted: refused, and the alias stays where it is."""

    name, concerns = "warm-up fails", "promotion"

    def strike(self, scene: Scene) -> dict[str, Any]:
        with scene.stage.client() as client:
            answer = wait_until(lambda: self._promote(client, scene), seconds=30, what="an answer to the promotion of a broken generation")
        if answer.json().get("code") != "storage_damaged":
            raise NotNoticed(f"the promotion of a broken generation was answered with {answer.status_code} {answer.text[:200]}")
        return {}

    def _promote(self, client: httpx.Client, scene: Scene) -> httpx.Response | None:
        body = {"generation": scene.broken, "force": True, "reason": "to see it refused"}
        with suppress(httpx.TransportError):
            seen = client.get(f"{API}/aliases/production")
            if seen.status_code == 200:
                answer = client.put(f"{API}/aliases/production", json=body, headers={"If-Match": seen.headers["etag"]})
                return None if answer.status_code in (412, 503) else answer
        return None


class PredictorOverloaded(Fault):
    """Five times as many images at once as may wait: each is answered in time, or refused with 503 and told when to come again."""

    name, concerns = "predictor overloaded", "predictor"

    def strike(self, scene: Scene) -> dict[str, Any]:
        if scene.load.predict_once() != 200:
            raise NotNow("nothing is served")
        image = encode(Image.new("RGB", (SIDE, SIDE), (250, 20, 10)))
        with scene.stage.client(timeout=60, limits=httpx.Limits(max_connections=ASKERS)) as client, ThreadPoolExecutor(ASKERS) as pool:
            answers = list(pool.map(lambda _: self._ask(client, image), range(2 * ASKERS)))
        odd = [answer.text[:200] for answer in answers if answer.status_code not in (200, 503)]
        odd += [answer.text[:200] for answer in answers if answer.status_code == 503 and "retry-after" not in answer.headers]
        late = [
            answer for answer in answers if answer.status_code == 200 and answer.json()["timings_ms"]["queue"] > 1000 * DEADLINE_SECONDS
        ]
        if odd or late:
            raise NotNoticed(f"overloaded, /predict answered {len(late)} too late and {odd[:3]}")
        return {str(status): sum(answer.status_code == status for answer in answers) for status in (200, 503)}

    def _ask(self, client: httpx.Client, image: bytes) -> httpx.Response:
        return client.post("/predict", content=image)


KINDS: tuple[type[Fault], ...] = (PromotionsInARow, PromotionKilled, WarmUpFails, PredictorOverloaded)
