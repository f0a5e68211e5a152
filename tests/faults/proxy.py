"""A TCP address in front of a server, through which its clients can be slowed down, cut off or lied to."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

COMMIT = b"COMMIT\x00"
"""In PostgreSQL's protocol: the end of the request to commit, and of the answer that says it was done."""
CHUNK = 1 << 16


@dataclass(eq=False, slots=True)
class _Link:
    """One client's connection and the one that was opened for it."""

    client: socket.socket
    server: socket.socket
    cut_after_commit: bool = False

    def peer(self, end: socket.socket) -> socket.socket:
        return self.server if end is self.client else self.client


class Proxy(threading.Thread):
    """Passes bytes on, until told otherwise. One for each client process, so that each can be cut off alone."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        """`connect` opens a connection to the server behind; OSError while it is away."""
        super().__init__(name="proxy", daemon=True)
        self._connect = connect
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_seconds = 0.0
        self.silent = False
        """Bytes vanish in both directions, and nobody hears that they did."""
        self.commits_to_cut = 0
        """Of so many further commits the server's answer is lost with the connection."""
        self.num_commits_cut = 0
        self._resets_wanted = threading.Event()
        self._over = False
        self._bell, self._ear = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._links: set[_Link] = set()
        self.start()

    def reset(self) -> None:
        """Cut every connection at once."""
        self._resets_wanted.set()
        self._bell.send(b"!")

    def speak_again(self) -> None:
        """End a silence as real ones end: what was said meanwhile is lost, and so are the connections."""
        self.silent = False
        self.reset()

    def close(self) -> None:
        """Stop, and cut everything."""
        self._over = True
        self._bell.send(b"!")
        self.join()

    def run(self) -> None:
        """Serve until closed."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._ear, selectors.EVENT_READ)
        while not self._over:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._ear:
                    self._ear.recv(CHUNK)
                elif key.data in self._links:
                    self._pass_on(key.data, key.fileobj)  # type: ignore[arg-type]
            if self._resets_wanted.is_set():
                self._resets_wanted.clear()
                self._drop_all()
        self._drop_all()
        for end in (self._listener, self._ear, self._bell):
            end.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        try:
            server = self._connect()
        except OSError:
            client.close()
            return
        link = _Link(client, server)
        self._links.add(link)
        for end in (client, server):
            # Who is stopped and reads nothing must not hold up the others for long.
            end.settimeout(5)
            self._selector.register(end, selectors.EVENT_READ, link)

    def _pass_on(self, link: _Link, end: socket.socket) -> None:
        try:
            data = end.recv(CHUNK)
        except OSError:
            data = b""
        if not data:
            if self.silent:
                # Even a good-bye is not heard.
                self._selector.unregister(end)
            else:
                self._drop(link, reset=False)
            return
        if self.silent:
            return
        if self.delay_seconds:
            time.sleep(self.delay_seconds)
        if self._is_lost_answer(link, end, data):
            self._drop(link, reset=True)
            return
        try:
            link.peer(end).sendall(data)
        except OSError:
            self._drop(link, reset=True)

    def _is_lost_answer(self, link: _Link, end: socket.socket, data: bytes) -> bool:
        """Notes requests to commit; True for the answer to one that is to be lost."""
        if end is link.client:
            if COMMIT in data and self.commits_to_cut > 0:
                self.commits_to_cut -= 1
                link.cut_after_commit = True
            return False
        if link.cut_after_commit and COMMIT in data:
            self.num_commits_cut += 1
            return True
        return False

    def _drop_all(self) -> None:
        for link in list(self._links):
            self._drop(link, reset=True)

    def _drop(self, link: _Link, *, reset: bool) -> None:
        self._links.discard(link)
        for end in (link.client, link.server):
            with suppress(KeyError, ValueError):
                self._selector.unregister(end)
            if reset:
                # Lingering for no time at all makes of the close a reset.
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


def connect_to(address: str | tuple[str, int]) -> Callable[[], socket.socket]:
    """What a Proxy needs: a path of a Unix socket, or host and port."""

    def connect() -> socket.socket:
        end = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM)
        try:
            end.connect(address)
        except OSError:
            end.close()
            raise
        return end

    return connect
