"""Structured logs: constant event names, ids as fields, JSON lines (or colors for a person), never a secret."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

if "rich" in sys.modules or TYPE_CHECKING:
    import structlog
else:
    # structlog 26 imports rich, where it is installed, for tracebacks that `format_exc_info` below writes anyway: a tenth of a
    # second of the start of every process that keeps logs. A None makes that import fail, which structlog is ready for.
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog
    finally:
        del sys.modules["rich"]

SECRET_WORDS = ("secret", "password", "authorization", "api_key", "token_secret")


def configure_logs(*, json_lines: bool, least: int = logging.INFO) -> None:
    """Send every log of this process to stderr, from the level `least` on; called once at a process's start."""
    renderer: Any = structlog.processors.JSONRenderer() if json_lines else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _hide_secrets,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _hide_secrets(_logger: Any, _method: str, event: Any) -> Any:
    for key in event:
        if any(word in key.lower() for word in SECRET_WORDS):
            event[key] = "[hidden]"
    return event


def get_log() -> Any:
    """The process's logger."""
    return structlog.get_logger()
