"""`child_run.py MODULE ADDRESS`: runs `main` of a module with a socket that comes over another
one."""

import importlib
import socket
import sys

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as source:
        source.connect("\0" + sys.argv[2])
        received = socket.recv_fds(source, 1, 1)[1]
    importlib.import_module(sys.argv[1]).main(received[0])
