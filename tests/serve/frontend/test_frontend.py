"""`serve.Engine`: complete answers, streams, coroutines and conversations give the same tokens."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import serve
from configs.errors import UserError

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PARAMS = serve.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def chat_folder(export_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "export"
    shutil.copytree(export_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Iterator[serve.Engine]:
    with serve.Engine(chat_folder, device="cpu", kv_tokens=2048) as made:
        yield made


def test_whole_answers_streams_and_coroutines_agree(engine: serve.Engine) -> None:
    prompts: list[str | list[int]] = ["The quick", [5, 6, 7]]
    whole = engine.generate(prompts, PARAMS)
    assert [one.finish_reason for one in whole] == ["length", "length"]
    pieces = [list(engine.stream(prompt, PARAMS)) for prompt in prompts]
    again = asyncio.run(engine.generate_async(prompts, PARAMS))

    async def streamed() -> list[int]:
        return [t async for piece in engine.stream_async(prompts[0], PARAMS) for t in piece.tokens]

    for one, parts, other in zip(whole, pieces, again, strict=True):
        assert one.text == "".join(piece.text for piece in parts) == other.text
        assert one.tokens == [token for piece in parts for token in piece.tokens] == other.tokens
    assert asyncio.run(streamed()) == whole[0].tokens
    assert engine.generate([], PARAMS) == []


def test_choices_come_in_turn(engine: serve.Engine) -> None:
    params = serve.SamplingParams(max_tokens=6, n=2, seed=3, ignore_eos=True)
    found = engine.generate(["a", "b"], params)
    assert [one.prompt for one in found] == [found[0].prompt] * 2 + [found[2].prompt] * 2
    assert found[0].tokens != found[1].tokens


def test_leaving_a_stream_cancels_the_request(engine: serve.Engine) -> None:
    for _ in engine.stream("The quick", serve.SamplingParams(max_tokens=150, ignore_eos=True)):
        break
    engine.flush_cache()  # runs between two steps, after the cancellation
    assert not engine.core.scheduler.busy
    assert engine.core.allocator.n_free == engine.core.allocator.n_pages - 1


def test_chat_is_the_template(engine: serve.Engine) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = "user: Hello\nassistant: "
    tokenizer = engine.core.export.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert engine.chat_prompt(messages) == tokens
    assert engine.chat(messages, PARAMS)[0].tokens == engine.generate([tokens], PARAMS)[0].tokens
    with pytest.raises(serve.RequestError, match="role and content"):
        engine.chat([{"role": "user"}])


def test_empty_prompts_are_errors(engine: serve.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they are what a template writes."""
    with pytest.raises(serve.RequestError, match="the prompt is empty"):
        list(engine.stream([], PARAMS))
    template = engine.chat_template
    assert template is not None
    monkeypatch.setattr(template, "render", lambda *_: "")
    for answers in (engine.chat, lambda messages: list(engine.stream_chat(messages))):
        with pytest.raises(serve.RequestError, match="the prompt is empty"):
            answers([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_templates_are_caged(
    chat_folder: Path, tmp_path: Path, template: str, message: str
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(chat_folder, folder)
    (folder / "chat_template.jinja").write_text(template)
    with serve.Engine(folder, device="cpu") as engine:
        with pytest.raises(serve.RequestError, match=message):
            engine.chat([{"role": "user", "content": "a"}])
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match="not a chat template"):
        serve.Engine(folder, device="cpu")


def test_new_weights_take_effect_and_old_ones_leave_nothing(
    engine: serve.Engine, chat_folder: Path, tmp_path: Path
) -> None:
    before = engine.generate(["The quick"] * 2, PARAMS)
    engine.update_weights(chat_folder)
    after = engine.generate(["The quick"], PARAMS)[0]
    assert after.tokens == before[0].tokens
    assert after.request is not None and after.request.num_cached == 0
    with pytest.raises(UserError, match="no such folder"):
        engine.update_weights(tmp_path / "nowhere")
    assert engine.generate(["The quick"], PARAMS)[0].tokens == after.tokens
