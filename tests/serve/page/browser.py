"""A headless browser, and a model that writes a given text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from scripts.screenshot_page import BROWSERS, find_browser
from serve.engine.batch import ForwardBatch
from serve.engine.core import EngineCore
from serve.engine.runner import ModelRunner

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@contextmanager
def open_browser() -> Iterator["Browser"]:
    """Skips the test if there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser in PATH: none of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu"])
        yield browser
        browser.close()


class ScriptedRunner:
    """Replaces the logits of one request at a time, without a prefix cache, so that greedy and
    sampled tokens are those of `text`, then the end token."""

    def __init__(self, core: EngineCore, text: str) -> None:
        self.runner: ModelRunner = core.executor.runner
        self.tokens = [*core.encode(text, add_special_tokens=False), 0]
        self.n = 0

    def run(
        self,
        batch: ForwardBatch,
        score: Callable[[int, Tensor], None] | None = None,
        routing: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        logits = self.runner.run(batch, score, routing)
        if len(batch.tokens) > 1:
            self.n = 0
        forced = torch.full_like(logits, -1e4)
        forced[:, self.tokens[min(self.n, len(self.tokens) - 1)]] = 0
        self.n += 1
        return forced

    def expert_counts(self) -> object:
        return self.runner.expert_counts()
