"""The policy server of the transformers engine: continuous batching of transformers, in the form of vLLM's server."""
