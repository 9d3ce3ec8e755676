"""The page at `/`: chat, and the load of the server and of its experts."""
