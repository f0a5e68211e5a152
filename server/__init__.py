"""The HTTP API over core: resources, live progress, predictions. Never imports torch."""
