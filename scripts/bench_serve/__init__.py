"""Serving measured over HTTP: ours and other servers, the same requests, in one run."""
