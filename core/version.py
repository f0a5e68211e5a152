"""The service's version, stated once for code; pyproject.toml repeats it and a test compares."""

VERSION = "0.1.0"
