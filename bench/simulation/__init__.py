"""What `bench.simulate` is made of: a run of tens of thousands of shards, and workers that only pretend to compute."""
