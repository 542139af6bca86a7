"""Send updated weights from the trainer to the policy server, and check that they arrived."""
