"""How updated weights travel from the trainer to the policy server, and the proof that they arrived."""
