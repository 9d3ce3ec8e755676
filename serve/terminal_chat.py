"""`python -m serve chat EXPORT`: a conversation on the terminal, without a server."""

import argparse
from collections.abc import Callable, Sequence

from rich.console import Console

from serve.engine.sampling_params import RequestError, SamplingParams
from serve.frontend.chat import Message
from serve.frontend.engine import Engine
from serve.options import engine_options, make_parser

HELP = "/reset: a new conversation; /system TEXT: one with these instructions; /exit: leave"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is invalid."""
    parser = make_parser("serve chat", "Talk to an exported model that has a chat template.")
    parser.add_argument("--system", help="instructions at the start of the conversation")
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share")
    parser.add_argument("--seed", type=int, help="the same answers again")
    return parser.parse_args(arguments)


def chat(options: argparse.Namespace) -> None:
    """Answer each line of the standard input until it ends. Raises RequestError if the model has
    no chat template."""
    params = {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
    SamplingParams(max_tokens=options.max_tokens, **params)  # check them before the model is read
    console = Console(highlight=False, soft_wrap=True)

    def write(text: str, end: str = "\n", style: str | None = None) -> None:
        console.print(text, end=end, style=style, markup=False, emoji=False)

    with Engine(
        options.folder, engine_options(options), dtype=options.dtype, device=options.device,
        tp=options.tp, ep=options.ep,
    ) as engine:  # fmt: skip
        if engine.chat_template is None:
            raise RequestError("this model has no chat template; use python -m serve generate")
        write(HELP, style="dim")
        talk = Conversation(engine, options.max_tokens, params, options.system)
        converse(talk, lambda: console.input("[bold]> [/]"), write)


class Conversation:
    """The messages up to now, and the engine that answers them."""

    def __init__(
        self, engine: Engine, max_tokens: int, params: dict[str, object], system: str | None
    ) -> None:
        self.engine = engine
        self.max_tokens = max_tokens
        self.params = params
        self.system = system
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Begin again, with the same instructions."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, write: Callable[[str], None]) -> None:
        """Write the answer to a message piece by piece, and keep both. Ctrl-C ends it early.
        Raises RequestError, without a change, if the conversation has become too long."""
        asked = [*self.messages, {"role": "user", "content": text}]
        tokens = self.engine.chat_prompt(asked)
        room = self.engine.core.inputs.info.longest - len(tokens)
        if room < 1:
            raise RequestError("the conversation is too long for the model; /reset begins again")
        settings = {"max_tokens": min(self.max_tokens, room), **self.params}
        pieces: list[str] = []
        try:
            for output in self.engine.stream(tokens, SamplingParams(**settings)):  # type: ignore[arg-type]
                pieces.append(output.text)
                write(shown(output.text))
        except KeyboardInterrupt:
            pass
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def converse(talk: Conversation, read: Callable[[], str], write: Callable[..., None]) -> None:
    """Answer lines until `read` raises EOFError or KeyboardInterrupt."""
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            write("")
            return
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            if command == "/system":
                talk.system = rest.strip() or None
            talk.reset()
            write("a new conversation", style="dim")
        elif line.startswith("/"):
            write(HELP, style="dim")
        elif line:
            try:
                talk.answer(line, lambda text: write(text, end=""))
                write("")
            except RequestError as error:
                write(f"error: {error}", style="red")


def shown(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
