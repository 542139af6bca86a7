"""The OpenAI-compatible server that serves the policy, and everything that runs inside it."""
