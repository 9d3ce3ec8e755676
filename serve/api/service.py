"""What the routes of a server share: its engine, its calls under way, the body of a request."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from serve.api.answer import Answer, Writer
from serve.api.errors import Json
from serve.api.fields import parse_json
from serve.api.limits import Drain, read_body
from serve.api.metrics import CONTENT_TYPE, Metrics
from serve.engine.request import Request, RequestError, start_grammars
from serve.frontend.chat import ChatTemplate
from serve.frontend.client import EngineClient
from serve.grammar.limits import ANSWER_SECONDS
from serve.tool_calls.choice import ChatFormat, choose_format

_LARGE_BODY = 64 * 2**10
"""Larger bodies are parsed and tokenized one after another, in a thread of their own."""

_T = TypeVar("_T")
MakeWriter = Callable[[Json, "Api"], Writer]


class Api:
    """State of the server that its routes share."""

    def __init__(
        self,
        engine: EngineClient,
        model_name: str,
        drain: Drain,
        template: ChatTemplate | None,
        model_path: str,
        tool_call_format: str,
    ) -> None:
        self.template = template
        self.chat_format = ChatFormat()
        if template is not None:
            self.chat_format = choose_format(template.source, template.try_render, tool_call_format)
        self.engine = engine
        self.inputs = engine.inputs
        self.model_name = model_name
        self.model_path = model_path
        self.drain = drain
        self.metrics = Metrics(engine, model_name)
        self.created = int(time.time())
        self.answers: dict[str, Answer] = {}
        """Calls under way, by name."""
        # each kind of work that may wait has threads of its own, so that none stops the others
        self._large: Executor = ThreadPoolExecutor(1, "large bodies")
        self._reading: Executor = ThreadPoolExecutor(2, "numbers")
        self._changing: Executor = ThreadPoolExecutor(1, "changes")

    async def health(self, http: HttpRequest) -> Response:
        """200 while the engine runs, otherwise 503."""
        if self.drain.started.is_set():
            return JSONResponse({"status": "the server is shutting down"}, 503)
        status = self.engine.status
        if status == "ok":
            return JSONResponse({"status": "ok"})
        message = "the engine has stopped" if status == "stopped" else "the engine is starting"
        return JSONResponse({"status": message}, 503)

    async def read(self, numbers: Callable[[], _T]) -> _T:
        """`numbers` of the engine, which may be slow to answer."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, numbers)

    async def change(self, work: Callable[[], _T]) -> _T:
        """Change the engine, which waits for a step; one change after another."""
        return await asyncio.get_running_loop().run_in_executor(self._changing, work)

    async def report_metrics(self, http: HttpRequest) -> Response:
        found = await self.read(self.metrics.render)
        return Response(found, media_type=CONTENT_TYPE)

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, http: HttpRequest) -> Response:
        if http.path_params["name"] != self.model_name:
            raise RequestError("there is no such model here", "model", 404, "model_not_found")
        return JSONResponse(self._card())

    def generate(self, make_writer: MakeWriter) -> Callable[[HttpRequest], object]:
        """A route that generates text: `make_writer` checks a body's fields and writes the
        answer."""

        async def route(http: HttpRequest) -> Response:
            self.drain.refuse()
            self.engine.refuse_if_full()
            writer = await self.in_thread(http, lambda fields: make_writer(fields, self))
            await _compiled(writer.requests)
            answer = Answer(self.engine, writer, self.metrics)
            names = set(writer.names)
            if not names.isdisjoint(self.answers):
                raise RequestError(
                    "a request with this rid is running", "rid", code="duplicate_rid"
                )
            self.answers |= dict.fromkeys(names, answer)
            answer.on_close = lambda: self._remove(names)
            return await answer.respond(http)

        return route

    def _remove(self, names: set[str]) -> None:
        for name in names:
            self.answers.pop(name, None)

    def abort(self, name: str | None) -> int:
        """Abort the call of a name, or all; returns their number."""
        found = {answer for key, answer in self.answers.items() if name in (None, key)}
        for answer in found:
            answer.abort()
        return len(found)

    async def in_thread(self, http: HttpRequest, work: Callable[[Json], _T]) -> _T:
        """`work` on the fields of the body, outside the event loop."""
        body = await read_body(http, self.drain)
        loop = asyncio.get_running_loop()
        pool = self._large if len(body) > _LARGE_BODY else None
        return await loop.run_in_executor(pool, _on_fields, work, body)

    def _card(self) -> Json:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "phalanx",
            "max_model_len": self.inputs.info.max_length,
        }


def _on_fields(work: Callable[[Json], _T], body: bytes) -> _T:
    try:
        return work(parse_json(body))
    except RecursionError:
        raise RequestError("the body is nested too deep", code="invalid_json") from None


async def _compiled(requests: Sequence[Request]) -> None:
    """Wait, in no thread, until the grammars of requests are compiled, and start them. Raises
    RequestError if one is refused, or it takes too long."""
    for compiling in {request.compiling for request in requests}:
        if compiling is not None:  # others may wait for it, too: it is not cancelled with this call
            waiting = asyncio.wrap_future(compiling)
            waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
            done, _ = await asyncio.wait([waiting], timeout=ANSWER_SECONDS)
            if not done:
                message = "the grammar is not compiled yet; try again later"
                raise RequestError(message, None, 503, "grammar_not_ready", 5)
    start_grammars(requests)
