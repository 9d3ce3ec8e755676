"""The engine for its users: `serve.Engine`, the thread that computes for all, chat templates."""
