"""Serve the policy: OpenAI-compatible servers, their clients, and a gateway in front of stock servers."""
