"""Code that runs in vLLM's processes: server entry point, plugin, `file` weight transfer engine, worker extension."""
