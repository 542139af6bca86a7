"""Device memory that the trainer and the policy server share: planned, handed over in turns, measured."""
