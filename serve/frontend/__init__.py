"""Interfaces of the engine: `serve.Engine`, the thread that computes, chat templates."""
