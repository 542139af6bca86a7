"""From dataset rows to trained trajectories: collect, check, record."""
