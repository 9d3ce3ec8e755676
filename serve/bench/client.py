"""One client for every server: OpenAI completions over HTTP, streamed, prompts as token ids."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from serve.bench.workloads import Turn, Workload

_MOST_REFUSAL = 400
"""Characters of an error that are shown."""


@dataclass(frozen=True)
class _Server:
    url: str
    model: str
    api_key: str


@dataclass
class Answer:
    """Arrival times of the pieces of one answer, seconds."""

    asked: float
    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    """Of the answer, if the server returns them."""


async def run(
    url: str, model: str, workload: Workload, api_key: str = "none"
) -> tuple[float, list[Answer]]:
    """Seconds that the workload took, and its answers.

    Args:
        url: With the path of the API, such as http://127.0.0.1:8000/v1.
        model: The name that the server uses.
        workload: What to send.
        api_key: Sent with every request.

    Raises RuntimeError if the server refuses a request or gives fewer tokens than requested.
    """
    server = _Server(url, model, api_key)
    limit = asyncio.Semaphore(workload.concurrency)
    start = time.perf_counter()
    found = await asyncio.gather(
        *(_converse(server, turns, limit) for turns in workload.conversations)
    )
    return time.perf_counter() - start, [answer for answers in found for answer in answers]


async def _converse(server: _Server, turns: list[Turn], limit: asyncio.Semaphore) -> list[Answer]:
    async with limit:
        tokens: list[int] = []
        answers = []
        for added, n_out in turns:
            tokens = tokens + added
            answers.append(answer := await _ask(server, tokens, n_out))
            known = len(answer.tokens) == n_out
            tokens = tokens + (answer.tokens if known else added[:1] * n_out)
        return answers


async def _ask(server: _Server, prompt: list[int], n_out: int) -> Answer:
    url, parts = server.url, urlsplit(server.url)
    body = json.dumps({
        "model": server.model, "prompt": prompt, "max_tokens": n_out, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True, "return_token_ids": True,
    }).encode()  # fmt: skip
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(
            f"POST {parts.path.rstrip('/')}/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"Authorization: Bearer {server.api_key}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        status = (await reader.readline()).split()
        if len(status) < 2 or status[1] != b"200":
            raise RuntimeError(f"{url}: {await _refusal(status, reader)}")
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                _take(answer, json.loads(line[6:]))
    finally:
        writer.close()
    if answer.output_tokens != n_out:
        raise RuntimeError(f"{url}: {answer.output_tokens} tokens came, {n_out} were requested")
    return answer


async def _refusal(status: list[bytes], reader: asyncio.StreamReader) -> str:
    """Status and body of an answer that is no stream, on one line."""
    body = (await reader.read()).partition(b"\r\n\r\n")[2]
    return b" ".join([*status[1:], *body.split()]).decode(errors="replace")[:_MOST_REFUSAL]


def _take(answer: Answer, event: dict[str, object]) -> None:
    usage = event.get("usage")
    if isinstance(usage, dict):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.output_tokens = usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    choices = event.get("choices")
    if isinstance(choices, list) and choices:
        answer.pieces.append(time.perf_counter())
        answer.tokens += choices[0].get("token_ids") or []
