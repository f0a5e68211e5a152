"""`python -m deploy`: the Compose file's fleet on loopback, without containers. `make fleet` runs this."""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
from pathlib import Path

from deploy.compose_file import MissingVariable, read_services
from deploy.fleet import Fleet, FleetFailed
from deploy.loopback import PUBLIC, Loopback

REPLICAS = {"api": 2, "predictor": 2, "worker": 3}
SLOTS = {"worker-3": 2}
"""Workers differ, as hosts do: this many attempts at a time, one where nothing is said."""
GPUS = Path("/proc/driver/nvidia/gpus")
BUCKET = "noisy-student"


def main(arguments: list[str] | None = None) -> int:
    """Start, tend until Ctrl-C, stop. 2 when something did not start."""
    parser = argparse.ArgumentParser(prog="python -m deploy", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("noisy-student-data/fleet"), help="rows, files and logs of the fleet")
    parser.add_argument("--port", type=int, default=8000, help="the one address is 127.0.0.1 and this port")
    parser.add_argument("--storage", choices=("s3", "folder"), default="s3", help="an S3 server, or one folder that all processes share")
    parser.add_argument("--environment", metavar="NAME=VALUE", action="append", default=[], help="a further variable for our processes")
    given = parser.parse_args(arguments)
    directory = given.directory.resolve()
    in_s3 = given.storage == "s3"
    further = dict(word.split("=", 1) for word in given.environment)
    place = Loopback(directory, REPLICAS, shares_data=not in_s3, ports={PUBLIC: given.port}, further=further, slots=SLOTS)
    if not (directory / "postgres-secret").exists():
        # Of a fleet whose directory was removed: nobody knows its password any more.
        place.remove_cluster()
    variables = {"POSTGRES_PASSWORD": _keep(directory / "postgres-secret"), "DATASETS": str(place.datasets)}
    if in_s3:
        variables |= {
            "STORAGE_URL": f"s3://{BUCKET}",
            "S3_ENDPOINT_URL": "http://storage:9000",
            "AWS_ACCESS_KEY_ID": "noisy-student",
            "AWS_SECRET_ACCESS_KEY": _keep(directory / "storage-secret"),
        }
    try:
        services = read_services(variables, profiles=[*(["s3"] if in_s3 else []), *(["cuda"] if GPUS.is_dir() else [])])
    except MissingVariable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fleet = Fleet(services, place, say=lambda text: print(text, flush=True))
    try:
        fleet.start()
        key = (place.data_directory("migrate") / "admin.key").read_text(encoding="utf-8").strip()
        print(f"\n{fleet.url}\n  datasets lie below {place.datasets}, logs and fleet.json in {directory}, rows in {place.postgres}")
        print(f"  export NOISY_STUDENT_URL={fleet.url} NOISY_STUDENT_API_KEY={key}\n  Ctrl-C stops it, and nothing is lost", flush=True)
        fleet.run()
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[0]}: {error.stderr.decode(errors='replace').strip()}", file=sys.stderr)
        return 2
    except (FleetFailed, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        fleet.stop()
    return 0


def _keep(path: Path) -> str:
    """A secret that stays the same for as long as the directory does."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(24))
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
