"""Messages between the HTTP server and an engine in a process of its own: msgpack over a socket
pair, which no other process can open.

Requests are numbered by the server. Token ids of prompts are sent as 32-bit integers (`token_key`).
"""

import socket
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from serve.engine.input_processor import EngineInfo
from serve.engine.request import FinishReason, SamplingParams, TokenLogprob
from serve.frontend.client import EngineStats

_T = TypeVar("_T")


class _Message(msgspec.Struct, tag=True, array_like=True):
    pass


class Array(msgspec.Struct, array_like=True):
    """A numpy array."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    @staticmethod
    def of(values: NDArray[Any]) -> "Array":
        return Array(values.dtype.str, values.shape, np.ascontiguousarray(values).tobytes())

    def read(self) -> NDArray[Any]:
        return np.frombuffer(self.content, np.dtype(self.dtype)).reshape(self.shape)


class Start(_Message):
    """The first message of the server. options: fields of `EngineOptions`. weights: the folder of
    the last update; empty: there was none."""

    folder: str
    dtype: str
    device: str
    options: dict[str, Any]
    weights: str = ""


class Ready(_Message):
    """The engine has started."""

    info: EngineInfo


class Refused(_Message):
    """It cannot start, for a reason that the user can change."""

    message: str


class CompiledGrammar(msgspec.Struct, array_like=True):
    number: int
    compiled: bytes
    is_json: bool


class NewRequest(msgspec.Struct, array_like=True):
    number: int
    prompt: int
    """Index in `Submit.prompts`."""
    params: SamplingParams
    priority: int
    group: int
    """Requests of one message with the same number are a group."""
    grammar: CompiledGrammar | None


class Submit(_Message):
    """Requests that are queued together."""

    prompts: list[bytes]
    requests: list[NewRequest]


class Cancel(_Message):
    numbers: list[int]


class Call(_Message):
    """A call of `name` with `text`, which `Returned` answers."""

    number: int
    name: str
    text: str = ""


class Stop(_Message):
    """End after the current step. It is a message, since a supervisor may send signals to all
    processes of the server, of which the first drains."""


class Returned(_Message):
    number: int
    error: str | None = None
    is_users: bool = False
    """Whether the user can change the reason of the error."""
    stats: EngineStats | None = None
    array: Array | None = None


class NewOutput(msgspec.Struct, array_like=True, omit_defaults=True):
    """See `Output` and `Request`; the last ones mostly have their defaults."""

    number: int
    text: str
    tokens: list[int]
    finish_reason: FinishReason | None
    num_cached: int | None
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []
    """Those that were not sent before."""
    matched: str | None = None
    routed_experts: Array | None = None


class Outputs(_Message):
    """The outputs of one step."""

    outputs: list[NewOutput]


FromServer = Start | Submit | Cancel | Call | Stop
FromEngine = Ready | Refused | Outputs | Returned


class Connection:
    """One end of the socket pair. One thread at a time may send, and one may receive."""

    def __init__(self, own: socket.socket, receives: Any) -> None:
        """receives: the type of the messages of the other end."""
        self.socket = own
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)

    def send(self, message: _Message) -> None:
        """Raises OSError if the other end is gone."""
        content = self._encoder.encode(message)
        self.socket.sendall(len(content).to_bytes(4, "big") + content)

    def receive(self) -> Any:
        """Raises EOFError if the other end is gone."""
        try:
            length = int.from_bytes(self._read(4), "big")
            return self._decoder.decode(self._read(length))
        except OSError:
            raise EOFError from None

    def _read(self, n: int) -> bytearray:
        found = bytearray(n)
        view, at = memoryview(found), 0
        while at < n:
            more = self.socket.recv_into(view[at:])
            if not more:
                raise EOFError
            at += more
        return found
