"""SGLang's serving benchmark without SGLang's engine: `python with_sglang_bench.py ARGUMENTS`.

Importing the package `sglang` or `sglang.srt` imports its engine, which requires a GPU's libraries.
Here both are empty packages with the folders of the installed ones.
"""

import importlib.machinery
import runpy
import sys
import types
from pathlib import Path


def empty_package(name: str, folder: Path) -> None:
    """Make `name` a package whose modules are found in `folder`."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = package


def main() -> None:
    found = next(Path(p) / "sglang" for p in sys.path if (Path(p) / "sglang" / "srt").is_dir())
    for name in ("sglang", "sglang.srt", "sglang.srt.utils", "sglang.srt.disaggregation"):
        empty_package(name, found.joinpath(*name.split(".")[1:]))
    constants = types.ModuleType("sglang.srt.disaggregation.utils")
    constants.FAKE_BOOTSTRAP_HOST = "2.2.2.2"  # type: ignore[attr-defined]
    sys.modules[constants.__name__] = constants
    runpy.run_module("sglang.benchmark.serving", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
