"""`python -m serve.grammar.worker FD`: forks processes that compile and match grammars.

A hostile grammar can overflow the C++ library's stack, fill the memory, or compute forever. So each
is compiled in a child with limits of time and memory, and the matchers of all requests are in
another, which can be replaced. This process loads the library and the vocabulary once; a fork takes
milliseconds. The engine sends a socket for each child over FD, with a byte that selects what the
child does, and closes FD at the end.
"""

import gc
import os
import signal
import socket
import sys

from tokenizers import Tokenizer

from serve.grammar.compilation import compile_one, limit_memory
from serve.grammar.limits import MATCH_BYTES
from serve.grammar.matching import serve_matchers
from serve.grammar.messages import receive
from serve.grammar.processes import COMPILE, READY
from serve.grammar.vocabulary import Vocabulary, make_vocabulary


def _child(kind: bytes, connection: socket.socket, vocabulary: Vocabulary) -> None:
    connection.sendall(READY)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    if kind == COMPILE:
        compile_one(connection, vocabulary)
    else:
        limit_memory(MATCH_BYTES)
        serve_matchers(connection, vocabulary)


def main(fd: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends when the engine does
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave no zombies
    control = socket.socket(fileno=fd)
    (end_tokens, size), tokenizer = receive(control)
    control.sendall(READY)
    vocabulary = make_vocabulary(Tokenizer.from_str(tokenizer.decode()), end_tokens, size)
    gc.freeze()  # children need not look at what is never freed
    while True:
        kind, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not kind:
            return
        if os.fork() == 0:
            control.close()
            try:
                _child(kind, socket.socket(fileno=fds[0]), vocabulary)
            finally:
                os._exit(0)
        os.close(fds[0])


if __name__ == "__main__":
    main(int(sys.argv[1]))
