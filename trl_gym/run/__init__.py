"""Run the servers of a training: start or attach to them, push weights, restart the policy server after a crash."""
