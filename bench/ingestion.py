"""Ten million images ingested by the service, and their manifest read through the API: bounded memory, pages that cost the same anywhere.

By hand: `python -m bench ingestion`; IMAGES says how many (10 000 000 when nothing is said, some forty minutes on two cores). They
are 4 × 4 pixels in Parquet files, as Hugging Face writes them, all different, under keys that come in no order: the
manifest has to sort them, which is the dearer case.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.measurement import Measurement, list_descendants, summary
from bench.service import Service, command_line, embedded, peak_resident_bytes
from core.db.api_keys import get_shared_secret
from core.db.session import Database
from core.settings import Settings
from server.pages import Cursors

ROWS_OF_FILE = 100_000
ROWS_OF_GROUP = 1_000
SEED = 11
PAGE = 50
TURNS = 30
_LOOK_SECONDS = 0.2
_SIDE = 4
_PLACES = ("first", "middle", "last")


def measure() -> Measurement:
    num_images = int(os.environ.get("IMAGES", "10000000"))
    found = Measurement(name="ingestion", details={"images": num_images, "seed": SEED, "page": PAGE})
    directory = Path(tempfile.mkdtemp(prefix="bench-ingestion-"))
    try:
        _write_pool(directory / "roots" / "pool", num_images)
        with embedded(directory, roots=directory / "roots") as service:
            started = time.monotonic()
            body = {"name": "pool", "kind": "unlabeled", "source": {"path": str(directory / "roots" / "pool")}}
            job = service.ask("POST", "/api/v1/datasets", body)
            watched = _watch(service, job["id"])
            seconds = time.monotonic() - started
            version = service.ask("GET", "/api/v1/dataset-versions/pool")
            assert version["num_images"] == version["num_usable"] == num_images, version
            found.tables["Ingestion (peak resident memory of the attempt's process)"] = [
                {"images": num_images, "seconds": seconds, "images/s": num_images / seconds, "peak MB": watched.peak_bytes / 1e6}
            ]
            found.details["attempts"] = watched.num_attempts
            found.figures["ingestion-memory"] = watched.peak_bytes / 1e6
            _measure_pages(found, service, version["id"], num_images)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return found


def _write_pool(folder: Path, num_images: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(SEED)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("key", pa.string()), ("image", image)])
    order = generator.permutation(num_images)
    for start in range(0, num_images, ROWS_OF_FILE):
        numbers = order[start : start + ROWS_OF_FILE]
        images = [{"bytes": data, "path": None} for data in _bitmaps(generator, len(numbers))]
        keys = [f"{number % 1000:03d}/{number:09d}.bmp" for number in numbers.tolist()]
        table = pa.table({"key": keys, "image": images}, schema=schema)
        pq.write_table(table, folder / f"part-{start // ROWS_OF_FILE:05d}.parquet", row_group_size=ROWS_OF_GROUP)


def _bitmaps(generator: np.random.Generator, number: int) -> Iterator[bytes]:
    """BMP files of random pixels."""
    size = 3 * _SIDE * _SIDE
    words = (40, _SIDE, _SIDE)
    head = b"BM" + (54 + size).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    head += b"".join(word.to_bytes(4, "little") for word in words) + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    pixels = generator.bytes(size * number)
    return (head + pixels[start : start + size] for start in range(0, size * number, size))


@dataclass(slots=True)
class _Watched:
    peak_bytes: int = 0
    num_attempts: int = 0


def _watch(service: Service, job_id: str) -> _Watched:
    """Look at the attempt's process until the job has ended."""
    watched, seen = _Watched(), set[int]()
    asked = time.monotonic()
    while True:
        for pid in list_descendants(service.processes["up"].pid):
            if "workers.attempt" in command_line(pid):
                seen.add(pid)
                watched.peak_bytes = max(watched.peak_bytes, peak_resident_bytes(pid))
        watched.num_attempts = len(seen)
        if time.monotonic() - asked > 1:
            asked = time.monotonic()
            job = service.ask("GET", f"/api/v1/jobs/{job_id}")
            if job["status"] == "succeeded":
                return watched
            if job["status"] in ("failed", "canceled"):
                raise RuntimeError(f"job {job_id} {job['status']}: {job['error']}")
        time.sleep(_LOOK_SECONDS)


def _measure_pages(found: Measurement, service: Service, version_id: str, num_images: int) -> None:
    """The same page again and again, at both ends and in the middle."""
    database = Database(Settings(data_directory=service.directory / "data").resolved_database_url)
    with database.transaction() as session:
        cursors = Cursors(get_shared_secret(session, "cursors"))
    database.close()
    positions = (0, num_images // 2, num_images - PAGE)
    path = f"/api/v1/dataset-versions/{version_id}/images?limit={PAGE}"
    seconds: dict[str, list[float]] = {place: [] for place in _PLACES}
    # The first request loads pyarrow.
    service.ask("GET", path)
    for _ in range(TURNS):
        for place, position in zip(_PLACES, positions, strict=True):
            cursor = cursors.encode(f"images?{version_id}&None", [position])
            started = time.perf_counter()
            page = service.ask("GET", f"{path}&cursor={cursor}")
            seconds[place].append(time.perf_counter() - started)
            assert len(page["items"]) == PAGE, page
    found.tables[f"Pages of {PAGE}, ms"] = [
        {"page": place, **{name: 1000 * value for name, value in summary(times).items()}} for place, times in seconds.items()
    ]
    found.details["page_seconds"] = seconds
    found.figures["manifest-paging"] = summary(seconds["last"])["median"] / summary(seconds["first"])["median"]
