"""ASGI middleware of the policy server: token-exact prompts, token bundles, call records, LoRA adapters."""
