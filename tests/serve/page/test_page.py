"""The page at `/` in a headless browser, and what it needs of the server without one."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export, open_export
from serve.page.routes import PAGE
from tests.serve.conftest import RunningServer, run_server
from tests.serve.drive import slow_down
from tests.serve.page.browser import ScriptedRunner, open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

ATTACK = "<script>hacked=1</script><img src=x onerror='hacked=1'>&lt;日"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def core(export: Export) -> EngineCore:
    return EngineCore(export, EngineOptions(kv_tokens=1024, cache="naive"))


@pytest.fixture
def page(browser: "Browser") -> Iterator["Page"]:
    """It loads nothing from elsewhere, and none of its scripts fails."""
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    urls: list[str] = []
    faults: list[str] = []
    opened.on("request", lambda request: urls.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    yield opened
    context.close()
    assert not faults
    assert all(re.match(r"http://127\.0\.0\.1:\d+/|data:", url) for url in urls), urls


def ask(page: "Page", text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def wait_for_end(page: "Page") -> None:
    page.wait_for_selector("#send:not([disabled])")


def wait_for_texts(page: "Page", selector: str, texts: list[str]) -> None:
    deadline = time.monotonic() + 20
    while (found := page.locator(selector).all_inner_texts()) != texts:
        assert time.monotonic() < deadline, (found, texts)
        page.wait_for_timeout(50)


def sent_bodies(page: "Page") -> list[Any]:
    """Filled with the bodies of the requests for text."""
    bodies: list[Any] = []

    def keep(request: "Request") -> None:
        if request.post_data:
            bodies.append(request.post_data_json)

    page.on("request", keep)
    return bodies


@pytest.mark.long
def test_a_conversation(page: "Page", core: EngineCore) -> None:
    """Streams, shows what it measured, keeps the conversation, and runs nothing that the model
    writes."""
    core.executor.runner = ScriptedRunner(core, ATTACK)  # type: ignore[assignment]
    bodies = sent_bodies(page)
    with run_server(core, name="<i>tiny</i>") as server:
        page.goto(server.url)
        page.wait_for_selector("#state:has-text('float32 on cpu')")
        assert page.inner_text("h1") == "<i>tiny</i>"
        assert page.is_hidden("#key-form") and page.is_hidden("#hint")
        page.click("summary")
        page.fill("#system", "Be <b>brief</b>")
        ask(page, "<b>Who</b> are you?")
        wait_for_end(page)
        assert page.inner_text(".answer") == ATTACK
        assert page.inner_text(".user") == "<b>Who</b> are you?"
        assert re.fullmatch(
            r"first token after \d+ ms, [\d.]+ tokens/s, \d+ tokens, 0 of \d+ prompt tokens from "
            "the cache",
            page.inner_text(".speed"),
        )
        ask(page, "Again")
        wait_for_end(page)
        assert page.evaluate("typeof hacked") == "undefined"
        assert page.locator("#log *").count() == page.locator("#log > div").count() == 6
        check_load(page, core)
        page.click("#reset")
        assert page.locator("#log *").count() == 0
        ask(page, "New")
        wait_for_end(page)
    system = {"role": "system", "content": "Be <b>brief</b>"}
    first, last = {"role": "user", "content": "<b>Who</b> are you?"}, {"role": "assistant"}
    assert bodies[0]["messages"] == [system, first]
    again = {"role": "user", "content": "Again"}
    assert bodies[1]["messages"] == [system, first, last | {"content": ATTACK}, again]
    assert bodies[2]["messages"] == [system, {"role": "user", "content": "New"}]


def check_load(page: "Page", core: EngineCore) -> None:
    """The tiles and the picture show the engine's numbers."""
    wait_for_texts(page, '[data-tile="tokens generated"] b', [str(core.n_generated)])
    assert page.inner_text('[data-tile="running"] b') == "0 / 16"
    assert page.inner_text('[data-tile="KV cache in use"] b') == "0.0 %"
    page.select_option("#span", "0")
    counts = core.expert_counts()
    ratios = [f"{row.max() / row.mean():.2f}" for row in counts]
    wait_for_texts(page, ".ratio", ratios)
    pixels = np.array(page.evaluate(
        "[...document.querySelectorAll('.layer canvas')].map(canvas => "
        "[...canvas.getContext('2d').getImageData(0, 0, canvas.width, 1).data])"
    )).reshape(len(counts), -1, 4)  # fmt: skip
    assert pixels.shape[:2] == counts.shape
    shares = counts / counts.mean(1, keepdims=True)
    red_wins = pixels[..., 0].astype(int) > pixels[..., 2]
    assert (red_wins[shares > 1.05]).all() and not red_wins[shares < 0.95].any()
    box = page.locator(".layer canvas").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 2)  # of four experts, number 2
    assert f"layer 0, expert 2: {shares[0, 2]:.2f} x mean" in page.inner_text("#cell")


@pytest.mark.long
def test_stop_ends_the_request(page: "Page", core: EngineCore) -> None:
    core.executor.runner = ScriptedRunner(core, "a" * 500)  # type: ignore[assignment]
    slow_down(core, 0.03)
    with run_server(core) as server:
        page.goto(server.url)
        page.wait_for_selector("#state:has-text('cpu')")
        ask(page, "x")
        page.wait_for_selector(".answer:has-text('aa')")
        page.click("#stop")
        wait_for_end(page)
        assert page.inner_text(".speed").endswith(", stopped")
        server.wait_until_idle()
        assert core.n_generated < 120, "its request was cancelled"
        assert set(page.inner_text(".answer")) == {"a"}, "what came is kept"
        page.evaluate("most.value = '9999'")
        ask(page, "too long")
        page.wait_for_selector(".wrong:has-text('together at most')")


@pytest.mark.long
def test_with_a_key_and_without_a_template(page: "Page", core: EngineCore) -> None:
    bodies = sent_bodies(page)
    with run_server(core, api_key="geheim", template=None) as server:
        page.goto(server.url)
        page.wait_for_selector("#key-form:not([hidden])")
        for key in ("wrong", "geheim"):
            page.fill("#key", key)
            page.press("#key", "Enter")
            page.wait_for_selector(
                "#state:has-text('missing or wrong')" if key == "wrong" else
                "#state:has-text('float32')"
            )  # fmt: skip
        assert page.is_hidden("#key-form") and page.is_visible("#hint")
        ask(page, "def f(")
        wait_for_end(page)
        assert "tokens/s" in page.inner_text(".speed")
    assert bodies[0]["prompt"] == "def f("
    page.wait_for_selector("#state:has-text('cannot be reached')")


def test_the_page_has_no_data_and_allows_only_itself(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as http:
        for method in ("GET", "HEAD"):
            found = http.request(method, "/")
            assert found.status_code == 200
            assert found.headers["content-type"] == "text/html; charset=utf-8"
        assert http.post("/").status_code == 405
        page = http.get("/")
    assert page.content == PAGE.read_bytes()
    policy = dict(
        part.split(" ", 1) for part in page.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[name])
        assert page.text.count(f"<{tag}") == 1, "its hash is in the policy"
    assert not re.search(r"https?://|innerHTML|\bon[a-z]+=|\bstyle=", page.text)


def test_stats(two_layers: Path) -> None:
    core = EngineCore(open_export(two_layers, device="cpu"), EngineOptions(kv_tokens=512))
    with run_server(core) as server, httpx.Client(base_url=server.url) as http:
        before = http.get("/stats").json()
        body = {"prompt": [5] * 33, "max_tokens": 6, "ignore_eos": True}
        assert http.post("/v1/completions", json=body).status_code == 200
        after = http.get("/stats").json()
    assert after["generated_tokens"] - before["generated_tokens"] == 6
    assert after["prompt_tokens"] - before["prompt_tokens"] == 33
    assert (after["status"], after["model"], after["chat"]) == ("ok", "tiny", True)
    experts = after["experts"]
    assert (experts["layers"], experts["n_experts"], experts["top_k"]) == ([0, 1], 4, 2)
    more = np.array(experts["counts"]) - np.array(before["experts"]["counts"])
    computed = 33 - after["cached_tokens"] + before["cached_tokens"] + 5
    assert (more.sum(1) == 2 * computed).all()
