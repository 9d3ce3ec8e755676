"""`serve.Engine`: completions from any script or notebook of the checkout, without a server.

All calls are computed by one thread, so calls from several threads and coroutines are batched
together. The thread starts with the first call.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from serve.engine.rank_group import connect, handle_signals
from serve.engine.request import (
    FinishReason,
    Output,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprob,
    start_grammars,
)
from serve.frontend.chat import ChatTemplate, Message, read_chat_template
from serve.frontend.follow import follow, open_together
from serve.frontend.thread import EngineThread

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """One whole completion of one prompt."""

    prompt: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    request: Request | None = field(default=None, repr=False)
    """Has further results: `num_cached`, `prompt_logprobs`, `routed_experts`."""

    def add(self, output: Output) -> None:
        self.text += output.text
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason


class Engine:
    """A model for generation. Use it as a context manager, or `close` it, to end its thread.

    Under torchrun, with `tp` or `ep`, all ranks create it, and the script continues on rank 0 only:
    on the others the constructor computes their part of rank 0's steps until rank 0 closes the
    engine, then raises SystemExit. Rank 0 gets SIGTERM as KeyboardInterrupt.
    """

    def __init__(
        self,
        model: str | Path | Export,
        options: EngineOptions | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        tp: int = 1,
        ep: int = 1,
        **settings: Any,
    ) -> None:
        """
        Args:
            model: The folder of an export, or an opened one.
            options: Sizes and modes.
            dtype, device: See `serve.engine.loading.open_export`.
            tp: Number of ranks that divide heads, widths and vocabulary.
            ep: Number of ranks that divide the experts.
            **settings: Fields of `EngineOptions`, instead of `options`.

        Raises UserError, one line, for invalid arguments.
        """
        assert options is None or not settings, "options or settings, not both"
        options = options or EngineOptions(**settings)
        self.chat_template: ChatTemplate | None = None
        if not isinstance(model, Export):
            self.chat_template = read_chat_template(Path(model))
            group = connect(Path(model), tp, ep, device)
            model = open_together(Path(model), dtype, device, options, group)
        self.group = model.group
        if self.group is not None and not self.group.ranks.is_first:
            follow(model, options)
            self.group.leave()
            raise SystemExit(0)
        self.core = EngineCore(model, options)
        self.thread = EngineThread(self.core)
        if self.group is not None:
            handle_signals(signal.default_int_handler)
            self.thread.start()  # it must not leave the other ranks alone

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; running requests end as cancelled."""
        self.thread.stop()
        if self.chat_template is not None:
            self.chat_template.process.close()
        if self.group is not None:
            self.group.leave()
            self.group = None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete prompts, text or token ids, batched as they fit; `n` completions of each in
        turn."""
        requests = self._requests(prompts, params)
        found = {request: Completion(request.prompt, request=request) for request in requests}
        done, left = threading.Event(), len(requests)

        def deliver(output: Output) -> None:
            nonlocal left
            found[output.request].add(output)
            left -= output.finish_reason is not None
            if not left:
                done.set()

        if requests:
            with self._submitted(requests, deliver):
                done.wait()
        return list(found.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Output]:
        """The outputs for one prompt as they are generated; leaving the loop cancels the rest."""
        requests = self._requests([prompt], params)
        outputs: SimpleQueue[Output] = SimpleQueue()
        with self._submitted(requests, outputs.put):
            left = len(requests)
            while left:
                output = outputs.get()
                left -= output.finish_reason is not None
                yield output

    async def generate_async(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """`generate` for coroutines; cancelling the task cancels the requests."""
        found: dict[Request, Completion] = {}
        async for output in self._outputs(await asyncio.to_thread(self._requests, prompts, params)):
            one = Completion(output.request.prompt, request=output.request)
            found.setdefault(output.request, one).add(output)
        return sorted(found.values(), key=lambda one: one.request.number)  # type: ignore[union-attr]

    async def stream_async(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[Output]:
        """`stream` for coroutines."""
        requests = await asyncio.to_thread(self._requests, [prompt], params)
        async for output in self._outputs(requests):
            yield output

    async def _outputs(self, requests: list[Request]) -> AsyncIterator[Output]:
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Output] = asyncio.Queue()

        def deliver(output: Output) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        with self._submitted(requests, deliver):
            left = len(requests)
            while left:
                output = await outputs.get()
                left -= output.finish_reason is not None
                yield output

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Answer a conversation of `{"role": ..., "content": ...}`; `params.n` answers."""
        return self.generate([self.chat_prompt(messages)], params)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[Output]:
        """`chat`, as it is generated."""
        return self.stream(self.chat_prompt(messages), params)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation, up to the start of the answer."""
        if self.chat_template is None or self.core.export.tokenizer is None:
            raise RequestError("this model has no chat template; use generate", "messages")
        encoder = self.core.inputs.text_encoder
        text = self.chat_template.render(messages, encoder.mark_text)
        return encoder.encode_rendered(text, "messages")

    def flush_cache(self) -> None:
        """Remove all cached prefixes."""
        self.thread.start()
        self.thread.flush_cache()

    def update_weights(self, folder: str | Path) -> None:
        """Continue with the weights of another export of the same model; running requests use them
        too, and everything computed with the old ones is discarded."""
        self.thread.start()
        self.thread.update_weights(str(folder))

    def _submitted(
        self, requests: list[Request], deliver: Callable[[Output], None]
    ) -> AbstractContextManager[None]:
        self.thread.start()
        return self.thread.submitted(requests, deliver)

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        each: list[Any] = [prompts] if one else list(prompts)
        params = params or SamplingParams()
        many = [params] * len(each) if isinstance(params, SamplingParams) else params
        requests = [
            request
            for prompt, p in zip(each, many, strict=True)
            for request in self.core.make_requests(
                self.core.encode(prompt) if isinstance(prompt, str) else prompt, p
            )
        ]
        start_grammars(requests)
        return requests
