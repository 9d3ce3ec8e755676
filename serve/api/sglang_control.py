"""SGLang's native routes other than /generate: information, load, cache, aborts, tokenizer,
weights."""

import asyncio
import time

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from configs.errors import UserError
from models.hf.messages import one_line
from serve.api.errors import Json, failure, printable
from serve.api.fields import flag, parse_json, text
from serve.api.limits import read_body
from serve.api.service import Api
from serve.engine.input_processor import InputProcessor
from serve.engine.request import Output, RequestError, SamplingParams

_HEALTH_SECONDS = 20.0
_MAX_PATH = 4096
_MAX_TEXTS = 1024
"""Texts, or lists of tokens, in one call."""


def control_routes(api: Api) -> list[Route]:
    control = _Control(api)
    both = ["GET", "POST"]
    return [
        Route("/health_generate", control.health_generate),
        Route("/model_info", control.model_info),
        Route("/get_model_info", control.model_info),
        Route("/server_info", control.server_info),
        Route("/get_server_info", control.server_info),
        Route("/get_load", control.get_load),
        Route("/v1/loads", control.loads),
        Route("/flush_cache", control.flush_cache, methods=both),
        Route("/abort_request", control.abort_request, methods=["POST"]),
        Route("/tokenize", control.tokenize, methods=["POST"]),
        Route("/detokenize", control.detokenize, methods=["POST"]),
        Route("/update_weights_from_disk", control.update_weights, methods=["POST"]),
    ]


class _Control:
    def __init__(self, api: Api) -> None:
        self.api = api
        self.inputs = api.inputs

    async def health_generate(self, http: HttpRequest) -> Response:
        """200 after the engine has computed a token, otherwise 503."""
        self.api.drain.refuse()
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        reasons: list[str | None] = []

        def deliver(output: Output) -> None:
            reasons.append(output.finish_reason)
            loop.call_soon_threadsafe(done.set)

        params = SamplingParams(max_tokens=1, temperature=0.0)
        requests = self.inputs.make_requests([0], params, priority=1 << 32)
        self.api.engine.submit(requests, deliver, limited=False)
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                await done.wait()
        except TimeoutError:
            raise RequestError("the engine does not respond", None, 503, "unavailable") from None
        finally:
            self.api.engine.cancel(requests)
        if failure(reasons[0]) is not None:
            raise RequestError("the engine fails", None, 503, "unavailable")
        return JSONResponse({"status": "ok"})

    async def model_info(self, http: HttpRequest) -> Response:
        return JSONResponse(
            {
                "model_path": self.api.model_path,
                "tokenizer_path": self.api.model_path,
                "served_model_name": self.api.model_name,
                "is_generation": True,
                "has_image_understanding": False,
                "has_audio_understanding": False,
            }
            | self._architecture()
        )

    async def server_info(self, http: HttpRequest) -> Response:
        info = self.inputs.info
        return JSONResponse(
            {
                "model_path": self.api.model_path,
                "tokenizer_path": self.api.model_path,
                "served_model_name": self.api.model_name,
                "tp_size": info.tp,
                "dp_size": 1,
                "disaggregation_mode": "null",
                "status": "ready" if self.api.engine.status == "ok" else self.api.engine.status,
                "max_total_num_tokens": info.capacity,
                "max_running_requests": info.max_running,
                "max_req_input_len": min(info.longest, info.capacity),
                "page_size": info.page_size,
                "internal_states": [await self._load()],
            }
            | self._architecture()
        )

    def _architecture(self) -> Json:
        info = self.inputs.info
        return {"model_type": info.model_type, "architectures": list(info.architectures)}

    async def _load(self) -> Json:
        info, stats = self.inputs.info, await self.api.read(self.api.engine.stats)
        return {
            "dp_rank": 0,
            "num_running_reqs": stats.n_running,
            "num_waiting_reqs": stats.n_waiting,
            "num_total_reqs": stats.n_running + stats.n_waiting,
            "num_used_tokens": stats.n_used_pages * info.page_size,
            "max_total_num_tokens": info.capacity,
            "max_running_requests": info.max_running,
            "token_usage": stats.token_usage,
            "cache_hit_rate": stats.hit_rate,
        }

    async def get_load(self, http: HttpRequest) -> Response:
        load = await self._load()
        found = {
            "dp_rank": 0,
            "num_reqs": load["num_total_reqs"],
            "num_waiting_reqs": load["num_waiting_reqs"],
            "num_tokens": load["num_used_tokens"],
        }
        return JSONResponse([found])

    async def loads(self, http: HttpRequest) -> Response:
        load = await self._load()
        total = {
            "total_running_reqs": load["num_running_reqs"],
            "total_waiting_reqs": load["num_waiting_reqs"],
            "total_reqs": load["num_total_reqs"],
        }
        return JSONResponse(
            {"timestamp": time.time(), "dp_rank_count": 1, "loads": [load], "aggregate": total}
        )

    async def flush_cache(self, http: HttpRequest) -> Response:
        """Requests under way recompute their prefixes."""
        await self.api.change(self.api.engine.flush_cache)
        return JSONResponse({"success": True, "message": "the prefix cache is empty"})

    async def abort_request(self, http: HttpRequest) -> Response:
        """Ends the calls named `rid`, or all with `abort_all`; an unknown name is no error."""
        fields = parse_json(await read_body(http, self.api.drain) or b"{}")
        name = text(fields, "rid")
        if not flag(fields, "abort_all") and name is None:
            raise RequestError("rid or abort_all is required", "rid")
        aborted = self.api.abort(None if flag(fields, "abort_all") else name)
        return JSONResponse({"success": True, "aborted": aborted})

    async def tokenize(self, http: HttpRequest) -> Response:
        def work(fields: Json) -> Json:
            prompt = fields.get("prompt", fields.get("text"))
            special = flag(fields, "add_special_tokens", True)
            longest = self.inputs.info.max_length
            if isinstance(prompt, str):
                tokens = self.inputs.encode(prompt, special)
                return {"tokens": tokens, "count": len(tokens), "max_model_len": longest}
            if not isinstance(prompt, list) or not all(isinstance(one, str) for one in prompt):
                raise RequestError("prompt must be a text or texts", "prompt", code="invalid_type")
            _check_number(prompt, "prompt")
            lists = [self.inputs.encode(one, special) for one in prompt]
            return {"tokens": lists, "count": [*map(len, lists)], "max_model_len": longest}

        return JSONResponse(await self.api.in_thread(http, work))

    async def detokenize(self, http: HttpRequest) -> Response:
        def work(fields: Json) -> Json:
            tokens = fields.get("tokens")
            skip = flag(fields, "skip_special_tokens", True)
            if isinstance(tokens, list) and tokens and isinstance(tokens[0], list):
                _check_number(tokens, "tokens")
                return {"text": [decode_tokens(self.inputs, one, skip) for one in tokens]}
            return {"text": decode_tokens(self.inputs, tokens, skip)}

        return JSONResponse(await self.api.in_thread(http, work))

    async def update_weights(self, http: HttpRequest) -> Response:
        """Another export of the same model, between two steps; an error changes nothing. Requests
        under way continue with it, or end with `abort_all_requests`."""
        fields = parse_json(await read_body(http, self.api.drain))
        path = text(fields, "model_path", _MAX_PATH)
        if path is None:
            raise RequestError("model_path is required", "model_path", code="invalid_type")
        if fields.get("load_format") not in (None, "auto", "safetensors"):
            raise RequestError("load_format must be auto or safetensors", "load_format")
        if flag(fields, "abort_all_requests"):
            self.api.abort(None)
        try:
            await self.api.change(lambda: self.api.engine.update_weights(path))
        except (UserError, OSError) as error:
            message = printable(one_line(error))
            return JSONResponse({"success": False, "message": message}, 400)
        self.api.model_path = path
        return JSONResponse(
            {"success": True, "message": "the weights are updated", "num_paused_requests": 0}
        )


def _check_number(texts: list[object], name: str) -> None:
    if len(texts) > _MAX_TEXTS:
        raise RequestError(f"at most {_MAX_TEXTS} texts fit in one call", name)


def decode_tokens(inputs: InputProcessor, tokens: object, skip_special_tokens: bool) -> str:
    """The text of token ids from a body. Raises RequestError."""
    vocab = inputs.info.vocab_size
    if inputs.tokenizer is None:
        raise RequestError("this model has no tokenizer", "tokens")
    if not isinstance(tokens, list) or not all(type(one) is int for one in tokens):
        raise RequestError("tokens must be a list of token ids", "tokens", code="invalid_type")
    if not all(0 <= token < vocab for token in tokens):
        raise RequestError(f"token ids must lie between 0 and {vocab - 1}", "tokens")
    # the library holds the interpreter lock while it decodes one list, but not for a batch
    (found,) = inputs.tokenizer.decode_batch([tokens], skip_special_tokens=skip_special_tokens)
    return str(found)
