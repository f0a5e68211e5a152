"""Measurements that print ratios and write JSON; never asserted on wall time. Experiments that write docs/experiments."""
