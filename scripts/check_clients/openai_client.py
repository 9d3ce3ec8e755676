"""The official client against one server."""

import json
from pathlib import Path

from scripts.check_clients.environments import run
from scripts.check_clients.setting import MODEL, Row, Setting


def check(setting: Setting) -> list[Row]:
    """Every parameter that the server documents, in three ways."""
    program, out = Path(__file__).with_name("with_openai.py"), setting.folder / "openai.json"
    with setting.server("one") as server:
        run(
            setting.python,
            ["-P", str(program), server.url, MODEL, str(out)],
            setting.folder,
            seconds=900,
        )
    return [Row(*row) for row in json.loads(out.read_text())]
