"""Start or attach to NeMo Gym, which has its own interpreter, and call it once per rollout."""
