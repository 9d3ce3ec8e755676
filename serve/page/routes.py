"""Routes of the page and of its data.

The page is one file without data, so it needs no API key; it requests the key and sends it with
each of its own requests. Its scripts and styles are known by their hashes, so that the browser runs
nothing else, whatever a model writes.
"""

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.api.errors import Json
from serve.api.service import Api

PAGE = Path(__file__).with_name("index.html")


def page_routes(api: Api) -> list[Route]:
    content = PAGE.read_bytes()
    headers = {
        "Content-Security-Policy": security_policy(content.decode()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def page(http: HttpRequest) -> Response:
        return Response(content, media_type="text/html", headers=headers)

    async def stats(http: HttpRequest) -> Response:
        return JSONResponse(await api.read(lambda: read_all(api)))

    return [Route("/", page), Route("/stats", stats)]


def security_policy(page: str) -> str:
    """Allows the page's own script and style, and requests to its own server."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in found)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def read_all(api: Api) -> Json:
    """What the page shows. `experts.counts` has a row per layer of `experts.layers`, of the tokens
    that chose each expert since the weights were loaded."""
    info, stats = api.inputs.info, api.engine.stats()
    return {
        "model": api.model_name,
        "status": api.engine.status,
        "chat": api.template is not None and api.inputs.tokenizer is not None,
        "dtype": info.dtype,
        "device": info.device,
        "max_model_len": info.max_length,
        "running": stats.n_running,
        "waiting": stats.n_waiting,
        "max_running": info.max_running,
        "token_usage": stats.token_usage,
        "max_total_num_tokens": info.capacity,
        "prompt_tokens": stats.n_prompt_tokens,
        "cached_tokens": stats.n_cached_tokens,
        "hit_rate": stats.hit_rate,
        "generated_tokens": stats.n_generated,
        "experts": {
            "layers": list(info.moe_layers),
            "n_experts": info.n_experts,
            "top_k": info.top_k,
            "counts": api.engine.expert_counts().tolist(),
        },
    }
