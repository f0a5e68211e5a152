"""Faults injected into real processes, and what must hold afterwards. `python -m tests.faults` runs them by the minute."""
