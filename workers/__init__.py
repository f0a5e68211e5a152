"""Celery's edge and the supervisor: hints in, one child process per attempt, leases, housekeeping. No tensors, no web."""
