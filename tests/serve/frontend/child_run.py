"""`child_run.py ADDRESS`: an engine's process, whose socket comes over another one."""

import socket
import sys

from serve.frontend.process_child import main

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as source:
        source.connect("\0" + sys.argv[1])
        received = socket.recv_fds(source, 1, 1)[1]
    main(received[0])
