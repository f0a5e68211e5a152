"""Facts about every room, and about the rooms together."""
