"""One client for every server: OpenAI completions over HTTP, streamed, prompts as token ids."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from scripts.bench_serve.workloads import Turn, Workload


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


async def run(url: str, model: str, workload: Workload) -> tuple[float, list[Answer]]:
    """Seconds that the workload took, and its answers."""
    limit = asyncio.Semaphore(workload.concurrency)
    start = time.perf_counter()
    found = await asyncio.gather(
        *(_converse(url, model, turns, limit) for turns in workload.conversations)
    )
    return time.perf_counter() - start, [answer for answers in found for answer in answers]


async def _converse(
    url: str, model: str, turns: list[Turn], limit: asyncio.Semaphore
) -> list[Answer]:
    async with limit:
        tokens: list[int] = []
        answers = []
        for added, n_out in turns:
            tokens = tokens + added
            answers.append(answer := await _ask(url, model, tokens, n_out))
            known = len(answer.tokens) == n_out
            tokens = tokens + (answer.tokens if known else added[:1] * n_out)
        return answers


async def _ask(url: str, model: str, prompt: list[int], n_out: int) -> Answer:
    parts = urlsplit(url)
    body = json.dumps({
        "model": model, "prompt": prompt, "max_tokens": n_out, "temperature": 0, "stream": True,
        "ignore_eos": True, "return_token_ids": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(
            f"POST {parts.path.rstrip('/')}/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n".encode()
            + body
        )
        status = (await reader.readline()).split()
        if len(status) < 2 or status[1] != b"200":
            raise RuntimeError(f"{url}: {(await reader.read(2000)).decode(errors='replace')}")
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                _take(answer, json.loads(line[6:]))
    finally:
        writer.close()
    if answer.output_tokens != n_out:
        raise RuntimeError(f"{url}: {answer.output_tokens} tokens came, {n_out} were asked for")
    return answer


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
