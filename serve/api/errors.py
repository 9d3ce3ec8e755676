"""Errors as clients of OpenAI's API expect them: one line in a JSON object, never a traceback."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from serve.engine.request import RequestError

Json = dict[str, Any]

_INTERNAL = ("the request failed inside the server", None, 500, "internal_error")
_DRAINING = ("the server is shutting down", None, 503, "unavailable")
_LOST = ("the engine ended and is starting again", None, 503, "engine_lost")
_FAILURES = {"error": _INTERNAL, "cancelled": _DRAINING, "lost": _LOST}
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def failure(reason: str | None) -> RequestError | None:
    """The error of a finish reason of the engine; None if the reason is no error.

    It is a new one each time, because an exception keeps the frames of every place that raised it.
    """
    if reason not in _FAILURES:
        return None
    return RequestError(*_FAILURES[reason])


def draining() -> RequestError:
    return RequestError(*_DRAINING)


def internal() -> RequestError:
    return RequestError(*_INTERNAL)


def printable(text: str) -> str:
    """One line of valid Unicode: parts of a message may come from a body or from a file."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def error_body(error: RequestError) -> Json:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(error.status, kind)
    message = printable(str(error))
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> JSONResponse:
    """Clients may send a refused request again after some seconds (429, 503)."""
    headers = {"Retry-After": str(error.retry_after)} if error.status in (429, 503) else {}
    if error.status in (408, 413, 503):  # the body may not have been read
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


async def on_request_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def on_http_error(http: HttpRequest, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        path: str = http.scope["path"]
        message = f"there is no {path:.200} here; docs/serving.md has the paths"
    shown = RequestError(message, None, error.status_code, "http_error")
    return JSONResponse(error_body(shown), error.status_code, error.headers)


async def on_disconnect(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # the client is gone


async def on_fault(http: HttpRequest, error: Exception) -> Response:
    return error_response(internal())
