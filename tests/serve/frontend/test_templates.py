"""Chat templates of hostile exports reach nothing, and their memory and time are limited."""

import gc
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jinja2 import TemplateError

from configs.errors import UserError
from serve.engine.sampling_params import RequestError
from serve.frontend import template_child, template_process
from serve.frontend.chat import ChatTemplate, read_chat_template

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, **variables: object) -> str:
    template = ChatTemplate(source, {})
    try:
        return template.render(HELLO, variables=variables)
    finally:
        template.process.close()


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ raise_exception.__globals__['sys'].exit() }}",
        "{{ strftime_now.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ joiner['__init__']['__globals__'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ (messages|attr('__class__')).__name__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ (1).__class__.__base__.__subclasses__() }}",
        "{{ loop.__class__ }}",
    ],
)
def test_templates_reach_nothing(source: str) -> None:
    """CVE-2026-5760. In this process, whose limits do not matter here."""
    try:
        template = template_child.compiled(source)
        text = "".join(template_child.pieces(template, {"messages": HELLO}))
    except (TemplateError, AttributeError, KeyError, TypeError, ValueError) as error:
        text = str(error)
    assert "root:" not in text and "uid=" not in text and "<class" not in text
    assert "[<" not in text and "{'__name__'" not in text


@pytest.fixture
def strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fraction of the limits: to write to 512 MiB or to wait for two seconds shows no more."""
    program = Path(template_child.__file__).read_text()
    for name, value in (("MAX_SECONDS = 2.0", "0.3"), ("MAX_BYTES = 1 << 29", "1 << 26")):
        assert program.count(f"\n{name}\n") == 1
        program = program.replace(name, f"{name.partition(' ')[0]} = {value}")
    (tmp_path / "template_child.py").write_text(program)
    monkeypatch.setattr(template_process, "_PROGRAM", tmp_path / "template_child.py")


def slow(source: str) -> object:
    """One of several sources that the same limit stops in the same way: of constants, filters,
    methods, operators and loops one each is not slow."""
    return pytest.param(source, marks=pytest.mark.slow)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'a' | center(9999999999) }}",
        slow("{{ 'a'.center(9999999999) }}"),
        "{{ '%9999999999d' % 1 }}",
        slow("{{ '%9999999999d' | format(1) }}"),
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'a' * 9999999999 }}",
        slow("{{ [0] * 9999999999 }}"),
        slow("{{ ('a' * 99999) | replace('a', 'a' * 99999) }}"),
        slow("{{ ([('a' * 9999999)] * 999) | join }}"),
        "{{ messages | tojson(indent=9999999999) }}",
        slow("{{ 'a\nb' | indent(9999999999) }}"),
        "{% set ns = namespace(l=[]) %}{% for i in range(999) %}"
        "{% set ns.l = ns.l + ['a' * 5000000 ~ loop.index] %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    ],
)
def test_memory_is_limited(source: str) -> None:
    """However it is used, also where constants are computed when the template is compiled."""
    with pytest.raises(RequestError, match=r"too much (memory|text)|takes too long"):
        render(source)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            marks=pytest.mark.slow,
        ),
        "{{ (9 ** (9 ** 9)) % 7 }}",
    ],
)
def test_time_is_limited(source: str) -> None:
    """Of the processor, so that a busy machine does not matter; also inside of one operation."""
    with pytest.raises(RequestError, match=r"takes too long|too much memory"):
        render(source)


@pytest.fixture
def fragile() -> Iterator[ChatTemplate]:
    template = ChatTemplate(
        "{% if bad %}{{ 'a' | center(9999999999) }}{% endif %}{{ messages[0].content }}", {}
    )
    yield template
    template.process.close()


def test_it_serves_on_after_a_failure(fragile: ChatTemplate) -> None:
    for _ in range(3):
        assert fragile.render(HELLO) == "hello"
        with pytest.raises(RequestError):
            fragile.render(HELLO, variables={"bad": True})
    process = fragile.process._process
    assert process is not None
    process.kill()
    process.wait()
    assert fragile.render(HELLO) == "hello", "it was started again"


def test_threads_get_their_own_texts(fragile: ChatTemplate) -> None:
    found: dict[int, str] = {}

    def work(i: int) -> None:
        found[i] = fragile.render([{"role": "user", "content": f"🙂 {i}" * 50}])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"🙂 {i}" * 50 for i in range(16)}


def test_its_process_ends_with_it() -> None:
    gc.freeze()  # collecting then visits only what is created here
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert template.render(HELLO) == "hello"
    process = template.process._process
    assert process is not None and process.poll() is None
    del template
    gc.collect()
    assert process.returncode is not None


def test_large_and_odd_texts_pass_unchanged() -> None:
    for text in ("a" * (1 << 20), "日本語🙂\u2028\r\n\x00\x85", "\ud800"):
        template = ChatTemplate("{{ messages[0].content }}", {})
        assert template.render([{"role": "user", "content": text}]) == text
        template.process.close()
    with pytest.raises(RequestError, match="too much text"):
        render(f"{{{{ 'a' * {template_child.MAX_TEXT + 1} }}}}")


def test_functions_of_transformers() -> None:
    source = (
        "{%- for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
        "{%- endfor %}\n   {% set x = 5 %}\n{{ tool | tojson }}{{ tool | tojson(indent=1) }}"
        "{{ strftime_now('%Y') }}{{ x }}"
    )
    template = ChatTemplate(source, {"eos_token": "</s>"})
    found = template.render(
        [*HELLO, {"role": "user", "content": "ü"}], variables={"tool": {"é": "<"}}
    )
    assert found == f'ü{{"é": "<"}}{{\n "é": "<"\n}}{time.strftime("%Y")}5'
    template.process.close()
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="not JSON"):
        render("{{ x }}", x=object())


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x | nothing }}", "{% for %}", "{{ " + "(" * 5000]
)
def test_errors_are_found_when_an_export_is_opened(tmp_path: Path, source: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(UserError, match="not a chat template") as caught:
        read_chat_template(tmp_path)
    assert "\n" not in str(caught.value)


def test_refusals_of_templates_are_printable() -> None:
    """A terminal obeys control characters, and a lone surrogate cannot be written."""
    with pytest.raises(RequestError, match="red") as caught:
        render(r"{{ raise_exception('\x1b[31mred\ud800') }}")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("given", [5, True, ["<s>"], {}, {"content": 5}, {"content": None}])
def test_special_tokens_that_are_no_texts(tmp_path: Path, given: object) -> None:
    config = {"chat_template": "{{ bos_token }}", "bos_token": given}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer_config.json: bos_token = .*: must be a text"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize("given", ["<s>", {"content": "<s>", "lstrip": False}, None])
def test_special_tokens(tmp_path: Path, given: object) -> None:
    config = {"chat_template": "{{ bos_token }}", "bos_token": given}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = read_chat_template(tmp_path)
    assert template is not None
    assert template.render(HELLO) == ("" if given is None else "<s>")
    template.process.close()


def test_json_without_escapes_and_marked_answers() -> None:
    """GLM's templates give `ensure_ascii`, and some mark what is trained on."""
    assert render("{{ x|tojson(ensure_ascii=False) }}{{ x|tojson }}", x="é") == '"é""é"'
    assert render("{{ x|tojson(ensure_ascii=True) }}", x="é") == '"\\u00e9"'
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render(text) == "hello"
