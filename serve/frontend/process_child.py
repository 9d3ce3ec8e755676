"""`python -m serve.frontend.process_child FD`: an engine for the server at the other end of a
socket, which `EngineProcess` starts. It ends with the server, however that ends.
"""

import signal
import socket
import sys
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from configs.errors import UserError
from models.hf.messages import one_line
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import load_update, open_export
from serve.engine.request import Output, Request
from serve.frontend.process_messages import (
    Array,
    Call,
    Cancel,
    CompiledGrammar,
    Connection,
    FromServer,
    NewOutput,
    Outputs,
    Ready,
    Refused,
    Returned,
    Start,
    Stop,
    Submit,
)
from serve.frontend.thread import EngineThread
from serve.grammar.limits import GrammarError
from serve.grammar.matcher import Grammar, GrammarState


class Child:
    """Runs the engine and translates its requests and outputs."""

    def __init__(self, connection: Connection, core: EngineCore) -> None:
        self.connection = connection
        self.core = core
        self.thread = EngineThread(core, self._send_outputs)
        self._requests: dict[int, Request] = {}
        self._numbers: dict[Request, int] = {}
        self._n_sent: dict[Request, int] = {}
        """Scores of prompts that were sent."""
        self._outputs: list[NewOutput] = []
        self._grammars: WeakValueDictionary[int, Grammar] = WeakValueDictionary()
        self._sending = threading.Lock()
        self._calls = ThreadPoolExecutor(1, "calls")
        self._starts = ThreadPoolExecutor(1, "worker of grammars")
        self._needs_worker = True
        self._queueing = threading.Lock()

    def run(self) -> None:
        """Until the server or the engine ends."""
        self.thread.start()
        self._send(Ready(self.core.inputs.info))
        threading.Thread(target=self._hang_up_after_engine, daemon=True).start()
        with suppress(EOFError):
            while True:
                message = self.connection.receive()
                if isinstance(message, Submit):
                    self._submit(message)
                elif isinstance(message, Cancel):
                    self._cancel(message.numbers)
                elif isinstance(message, Stop):
                    self.thread.stop(wait=False)
                else:
                    self._call(message)
        self.thread.stop()

    def _hang_up_after_engine(self) -> None:
        self.thread.join()
        with suppress(OSError):
            self.connection.socket.shutdown(socket.SHUT_RDWR)

    def _submit(self, message: Submit) -> None:
        prompts = [array("i", prompt).tolist() for prompt in message.prompts]
        groups: dict[int, object] = {}
        requests = []
        for new in message.requests:
            group = groups.setdefault(new.group, object())
            request = self.core.inputs.make_request(
                prompts[new.prompt], new.params, new.priority, group
            )
            if new.grammar is not None:
                request.grammar = GrammarState(self._grammar(new.grammar))
            self._requests[new.number] = request
            self._numbers[request] = new.number
            requests.append(request)
        if self._needs_worker and any(request.grammar is not None for request in requests):
            self._starts.submit(self._start_worker, requests)
        else:
            self._queue(requests)

    def _start_worker(self, requests: list[Request]) -> None:
        """Start the worker of grammars, which takes seconds, in a thread of its own: the engine
        would wait for it, and all requests with it."""
        assert self.core.grammars is not None
        with suppress(GrammarError):  # the requests get this error from the engine
            self.core.grammars.worker.start()
        with self._queueing:  # a request that is cancelled now is either left out or queued
            self._needs_worker = False
            self._queue([request for request in requests if request in self._numbers])

    def _queue(self, requests: list[Request]) -> None:
        # it cannot be full: the server counts the requests; it may have ended
        with suppress(ValueError):
            self.thread.submit(requests, self._deliver, limited=False)

    def _cancel(self, numbers: list[int]) -> None:
        with self._queueing:
            found = [self._requests.pop(number, None) for number in numbers]
            requests = [request for request in found if request is not None]
            self.thread.cancel(requests)
            for request in requests:
                self._numbers.pop(request, None)
                self._n_sent.pop(request, None)

    def _grammar(self, sent: CompiledGrammar) -> Grammar:
        found = self._grammars.get(sent.number)
        if found is None:
            n_tokens = self.core.inputs.info.n_sampled
            found = Grammar(sent.number, sent.compiled, sent.is_json, n_tokens)
            self._grammars[sent.number] = found
        return found

    def _call(self, call: Call) -> None:
        if call.name == "stats":
            self._send(Returned(call.number, stats=self.thread.stats()))
        elif call.name == "expert_counts":
            self._send(Returned(call.number, array=Array.of(self.thread.expert_counts())))
        else:  # they wait for a step
            self._calls.submit(self._call_engine, call)

    def _call_engine(self, call: Call) -> None:
        try:
            if call.name == "flush_cache":
                self.thread.flush_cache()
            else:
                assert call.name == "update_weights", call.name
                self.thread.update_weights(call.text)
        except Exception as error:
            users = isinstance(error, UserError | OSError)
            self._send(Returned(call.number, one_line(error), users))
        else:
            self._send(Returned(call.number))

    def _deliver(self, output: Output) -> None:
        """In the engine's thread."""
        request = output.request
        number = self._numbers.get(request)
        if number is None:
            return  # it was just cancelled
        begin = self._n_sent.get(request, 0)
        new = NewOutput(
            number, output.text, output.tokens, output.finish_reason, request.num_cached,
            output.logprobs, request.prompt_logprobs[begin:], request.matched,
            None if request.routed_experts is None else Array.of(request.routed_experts),
        )  # fmt: skip
        if new.prompt_logprobs:
            self._n_sent[request] = begin + len(new.prompt_logprobs)
        if output.finish_reason is not None:
            self._requests.pop(number, None)
            self._numbers.pop(request, None)
            self._n_sent.pop(request, None)
        self._outputs.append(new)

    def _send_outputs(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._send(Outputs(outputs))

    def _send(self, message: Outputs | Ready | Returned) -> None:
        with self._sending, suppress(OSError):  # the server is gone; receiving ends, too
            self.connection.send(message)


def main(fd: int) -> None:
    connection = Connection(socket.socket(fileno=fd), FromServer)
    for number in (signal.SIGINT, signal.SIGTERM):  # for the server, which then ends this process
        signal.signal(number, signal.SIG_IGN)
    start = connection.receive()
    assert isinstance(start, Start)
    try:
        export = open_export(Path(start.folder), start.dtype, start.device)
        if start.weights:
            export = load_update(export, Path(start.weights))
        core = EngineCore(export, EngineOptions(**start.options))
    except UserError as error:
        connection.send(Refused(str(error)))
        return
    Child(connection, core).run()


if __name__ == "__main__":
    with suppress(EOFError, BrokenPipeError):  # the server ended
        main(int(sys.argv[1]))
