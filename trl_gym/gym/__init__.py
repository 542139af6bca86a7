"""NeMo Gym: its servers (in their own interpreter) and the one HTTP call that runs a rollout."""
