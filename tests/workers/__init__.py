"""Facts about workers: nothing lost, nothing twice."""
