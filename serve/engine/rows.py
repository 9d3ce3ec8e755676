"""The rows of a step whose logits somebody reads."""

from dataclasses import dataclass

from serve.engine.request import Request
from serve.engine.scheduler import Chunk


@dataclass(frozen=True)
class Row:
    """Whose logits a row holds: those of the token after `position`."""

    request: Request
    position: int

    @property
    def samples(self) -> bool:
        """The next token is not known yet."""
        return self.position + 1 == len(self.request.tokens)


def wanted_rows(chunk: Chunk) -> list[Row]:
    """The rows of a chunk that are read: those that score the prompt, and the newest token's."""
    request = chunk.request
    positions: list[int] = []
    if request.params.scores_prompt:  # not twice, when the request was preempted
        begin = max(chunk.start, len(request.prompt_logprobs))
        positions += range(begin, min(chunk.end, len(request.prompt) - 1))
    if chunk.samples:
        positions.append(chunk.end - 1)
    return [Row(request, position) for position in positions]
