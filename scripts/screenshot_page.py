"""`python -m scripts.screenshot_page EXPORT OUT.png`: a picture of the server's page at work.

Serves the export, sends a message from the page in a headless Chromium while other requests run,
and saves what the page shows. Needs `pip install -e ".[browser]"` and a Chromium in PATH.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ROOT = Path(__file__).resolve().parent.parent
_OTHER_CLIENTS = 3
_SECONDS = 8.0
_TOKENS = 100
_INSTALL = 'needs playwright: pip install -e ".[browser]"'


def find_browser() -> str | None:
    """The program of a browser that playwright can drive; None if there is none in PATH."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@contextlib.contextmanager
def serving(export: Path) -> Iterator[str]:
    """A server of the export; its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", str(export), "--port", "0", "--model-name", "demo"],
        cwd=_ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving "):
            raise UserError(f"{export}: the server did not start")
        yield line[line.index("http://") :].split("/v1")[0]
    finally:
        process.terminate()
        process.wait()


def _load(url: str, number: int, stop: threading.Event) -> None:
    """One client that requests text again and again."""
    while not stop.is_set():
        body = {"prompt": [number + 5, 7, 9, 11] * 8, "max_tokens": 200, "ignore_eos": True}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
        with contextlib.suppress(OSError), urllib.request.urlopen(request) as answer:
            answer.read()


def take(url: str, prompt: str, out: Path) -> None:
    """Save a picture of the page after an answer. Raises UserError without a browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError(f"scripts.screenshot_page: {_INSTALL}") from None
    program = find_browser()
    if program is None:
        raise UserError(f"scripts.screenshot_page: none of {', '.join(BROWSERS)} is in PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 720}, color_scheme="light")
        page.goto(url)
        page.wait_for_selector("#state:not(:has-text('connecting'))")
        page.click("summary")
        page.fill("#most", str(_TOKENS))
        page.click("summary")
        page.fill("#prompt", prompt)
        page.press("#prompt", "Enter")
        page.wait_for_timeout(1000 * _SECONDS)
        page.wait_for_selector("#send:not([disabled])")
        page.screenshot(path=str(out))
        browser.close()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is invalid."""
    parser = CommandParser(prog="python -m scripts.screenshot_page", description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("out", type=Path, help="such as docs/images/page.png")
    parser.add_argument("--prompt", default="def add(a, b):")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or 2 with one line for an error of the user."""
    try:
        options = parse(arguments)
        with serving(options.export) as url:
            stop = threading.Event()
            clients = [
                threading.Thread(target=_load, args=(url, number, stop), daemon=True)
                for number in range(_OTHER_CLIENTS)
            ]
            for client in clients:
                client.start()
            take(url, options.prompt, options.out)
            stop.set()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
