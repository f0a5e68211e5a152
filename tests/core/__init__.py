"""Facts about rows, files and words."""
