"""The HTTP server: OpenAI completions over the engine."""
