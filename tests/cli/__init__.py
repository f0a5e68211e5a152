"""The command line: set-up, client, invariants, demo."""
