"""A module that starts a thread when it is imported, for test_forks.py."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
