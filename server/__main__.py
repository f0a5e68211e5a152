"""`python -m server`: the API alone, on the address of the settings. `noisy-student up` starts this as one of its children.

`python -m server --predictor`: a predictor replica, which answers /predict and nothing else; any number of them run beside the API.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from core.errors import PortInUse, SetupError
from core.logs import configure_logs, get_log
from core.settings import Settings
from server.app import create_app, create_predictor
from server.progress import ProgressHub
from server.protocol import GuardedProtocol

MAX_CONNECTIONS = 2000
GRACE_SECONDS = 10
BACKLOG = 256
HUNG = 70
"""Exit code of a process whose predictor hangs: EX_SOFTWARE of sysexits.h."""


class ApiServer(uvicorn.Server):
    """uvicorn, whose first signal also ends the event streams (they would hold the end back until its timeout), and whose exit is clean."""

    def __init__(self, config: uvicorn.Config, streams: ProgressHub) -> None:
        super().__init__(config)
        self.streams = streams
        self.loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  uvicorn's signature
        """Wind down; a second signal does not wait. uvicorn's own would raise the signal again and end with its number."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.streams.stop)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop, which the signal handler needs."""
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)


def open_socket(host: str, port: int) -> socket.socket:
    """Listen, or PortInUse in one line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once only on sockets that say they are TCP; otherwise each answer waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise PortInUse(f"cannot listen on {host}:{port}: {error.strerror}; choose another NOISY_STUDENT_PORT") from error
    return listener


def make_server(app: FastAPI) -> ApiServer:
    """The server with its deadlines and caps."""
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
    )
    return ApiServer(config, app.state.services.progress)


def main() -> int:
    """Serve until SIGTERM or Ctrl-C; 2 when the process cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m server", description="The API, or a predictor replica, on the address of the settings."
    )
    parser.add_argument("--predictor", action="store_true", help="answer /predict and nothing else")
    options = parser.parse_args()
    configure_logs(json_lines=not sys.stderr.isatty())
    try:
        settings = Settings()
        listener = open_socket(settings.host, settings.port)
        app = create_predictor(settings) if options.predictor else create_app(settings)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # A thread in a stuck native call cannot be stopped: only a new process helps, and whoever supervises this one starts it.
    app.state.services.serving.watchdog.on_hung = lambda: os._exit(HUNG)
    # What was imported stays: a collection that looks through all of it would now and then hold an answer back for a tenth of a second.
    gc.collect()
    gc.freeze()
    get_log().info("server.started", host=settings.host, port=settings.port, predictor=options.predictor)
    make_server(app).run(sockets=[listener])
    get_log().info("server.stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
