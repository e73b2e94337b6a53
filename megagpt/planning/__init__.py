"""What a run will need before it is paid for: memory, time, cost, failures; and a cluster played in time."""
