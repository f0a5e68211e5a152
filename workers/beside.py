"""Something slow, done by a thread of its own while somebody else keeps an eye on the time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from core.errors import ServiceError

T = TypeVar("T")


class Beside(Generic[T]):
    """Begins at once. A thread that nobody waits for any more ends by itself, and holds no process up.

    It is given `abandoned`, and looks at it before it touches what somebody else may have taken up since.
    """

    def __init__(self, doing: Callable[[threading.Event], T]) -> None:
        self.abandoned = threading.Event()
        self._future: Future[T] = Future()
        self._doing = doing
        self._done = threading.Event()
        threading.Thread(target=self._run, name="beside", daemon=True).start()

    def _run(self) -> None:
        try:
            self._future.set_result(self._doing(self.abandoned))
        except (ServiceError, SQLAlchemyError, OSError) as error:
            self._future.set_exception(error)
        finally:
            # After a surprise, whose traceback the thread prints: whoever waits is surprised as well.
            self._future.cancel()
            self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, perhaps within that time."""
        return self._done.wait(seconds)

    def result(self) -> T:
        """What came of it; raises what it raised."""
        return self._future.result()
