"""`python -m serve chat`: the same answers as `serve.Engine`, and its commands."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import serve
from serve.__main__ import main
from serve.frontend.chat import Message
from serve.terminal_chat import Conversation, converse, shown

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(export_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chat") / "export"
    shutil.copytree(export_folder, made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[serve.Engine]:
    with serve.Engine(folder, device="cpu", kv_tokens=1024) as made:
        yield made


@pytest.fixture
def talk(engine: serve.Engine) -> Conversation:
    return Conversation(engine, 8, {"temperature": 0.0}, None)


def say(talk: Conversation, *lines: str) -> str:
    """What is written after these lines and the end of the input."""
    left, written = list(lines), io.StringIO()

    def read() -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    def write(text: str, end: str = "\n", style: str | None = None) -> None:
        written.write(text + end)

    converse(talk, read, write)
    return written.getvalue()


def answer(engine: serve.Engine, messages: list[Message], n: int = 8) -> str:
    params = serve.SamplingParams(max_tokens=n, temperature=0)
    return engine.chat(messages, params)[0].text


def test_turns_continue_the_conversation(engine: serve.Engine, talk: Conversation) -> None:
    messages: list[Message] = []
    for text in ("Hi", "é"):
        messages.append({"role": "user", "content": text})
        expected = answer(engine, messages)
        assert say(talk, text, "").strip() == shown(expected).strip()
        messages.append({"role": "assistant", "content": expected})
        assert talk.messages == messages


def test_reset_and_system(engine: serve.Engine, talk: Conversation) -> None:
    say(talk, "Hi", "/system Be brief", "Hello")
    system = {"role": "system", "content": "Be brief"}
    user = {"role": "user", "content": "Hello"}
    reply = {"role": "assistant", "content": answer(engine, [system, user])}
    assert talk.messages == [system, user, reply]
    say(talk, "/reset")
    assert talk.messages == [system], "it keeps the instructions"
    say(talk, "/system")
    assert talk.messages == []
    assert "/reset" in say(talk, "/unknown") and talk.messages == []
    assert say(talk, "/exit", "Hi") == "" and talk.messages == []


def test_a_conversation_that_is_too_long_is_unchanged(talk: Conversation) -> None:
    say(talk, "Hi")
    before = talk.messages
    assert "too long" in say(talk, "a b c " * 100)
    assert talk.messages == before
    say(talk, "go on")
    assert len(talk.messages) == 4


def test_interrupted_answers_are_kept(talk: Conversation) -> None:
    def write(text: str) -> None:
        raise KeyboardInterrupt

    talk.answer("Hi", write)
    assert len(talk.messages) == 2
    talk.engine.flush_cache()
    assert not talk.engine.core.busy, "the request was cancelled"


def test_terminals_get_no_control_characters(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    escape = serve.Output(None, "\x1b[2J\u202e a\n\tb", [], [], "stop")  # type: ignore[arg-type]
    monkeypatch.setattr(talk.engine, "stream", lambda *_: iter([escape]))
    assert say(talk, "Hi") == "\\x1b[2J\\u202e a\n\tb\n\n"


def test_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/reset\n"))
    assert main(["chat", str(folder), "--device=cpu", "--temperature=0", "--max-tokens=8"]) == 0
    out, errors = capsys.readouterr()
    assert errors == "" and "a new conversation" in out and out.startswith("/reset: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature=9"], "temperature must lie between 0 and 2"),
        (["--max-tokens=-1"], "max_tokens must lie between"),
        ([], "this model has no chat template"),
    ],
)
def test_errors_take_one_line(
    words: list[str], message: str, export_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(export_folder), "--device=cpu", *words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
