"""The engine: scheduler, paged KV cache, sampling and an OpenAI-compatible server."""
