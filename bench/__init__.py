"""Measurements that print ratios and write JSON; never asserted on wall time. Experiments that write docs/experiments."""

# Before torch, as in production: it sets how long idle OpenMP threads spin.
import ml  # noqa: F401
