"""Turn dataset rows into trajectories: run rollouts, check and record them."""
