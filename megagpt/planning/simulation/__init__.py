"""A cluster played in time: what stragglers, failures, checkpoints and waits for nodes leave of a run's throughput."""
