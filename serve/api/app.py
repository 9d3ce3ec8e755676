"""HTTP: the APIs of OpenAI and SGLang in front of the engine.

The event loop only moves bytes: parsing and tokenizing run in worker threads, computation in the
engine's thread or process. However a connection ends, its requests are cancelled, which frees
their pages. Errors have one line for the client; tracebacks are written to the server's log.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from serve.api.answer import Writer
from serve.api.errors import (
    Json,
    on_disconnect,
    on_fault,
    on_http_error,
    on_request_error,
)
from serve.api.limits import ApiKey, Drain, HeaderLimit
from serve.api.openai_chat import ChatWriter
from serve.api.openai_completions import CompletionsWriter
from serve.api.service import Api
from serve.api.sglang_control import control_routes
from serve.api.sglang_generate import GenerateWriter
from serve.engine.request import RequestError
from serve.frontend.chat import ChatTemplate
from serve.frontend.client import EngineClient
from serve.page.routes import page_routes


def build_app(
    engine: EngineClient,
    model_name: str,
    on_ready: Callable[[], None],
    *,
    drain: Drain | None = None,
    api_key: str | None = None,
    template: ChatTemplate | None = None,
    model_path: str | None = None,
    tool_call_format: str = "auto",
) -> Starlette:
    """The application; it starts `engine` and stops it.

    Args:
        engine: In this process or another.
        model_name: The name that clients use.
        on_ready: Called once it is ready.
        drain: Set when the server shuts down.
        api_key: Clients must send it.
        template: For chats; None if the export has none.
        model_path: The folder of the export, for routers.
        tool_call_format: A name of `serve.tool_calls.forms`, or `auto`: that of the template.
    """
    drain = drain or Drain()
    api = Api(engine, model_name, drain, template, model_path or model_name, tool_call_format)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        api.drain.loop = asyncio.get_running_loop()
        engine.start()
        on_ready()
        yield
        await asyncio.to_thread(engine.stop)

    key = [] if api_key is None else [Middleware(ApiKey, key=api_key)]
    app = Starlette(
        routes=[
            Route("/health", api.health),
            Route("/metrics", api.report_metrics),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/completions", api.generate(_completions), methods=["POST"]),
            Route("/v1/chat/completions", api.generate(_chat), methods=["POST"]),
            Route("/generate", api.generate(_native), methods=["POST", "PUT"]),
            *control_routes(api),
            *page_routes(api),
        ],
        exception_handlers={
            RequestError: on_request_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_disconnect,
            Exception: on_fault,
        },
        middleware=[Middleware(HeaderLimit), *key],
        lifespan=lifespan,
    )
    # behind a proxy that ends TLS, a redirect to the path without a slash would lead to http
    app.router.redirect_slashes = False
    return app


def _completions(fields: Json, api: Api) -> Writer:
    return CompletionsWriter(fields, api.inputs, api.model_name)


def _chat(fields: Json, api: Api) -> Writer:
    return ChatWriter(fields, api.inputs, api.template, api.chat_format, api.model_name)


def _native(fields: Json, api: Api) -> Writer:
    return GenerateWriter(fields, api.inputs)
