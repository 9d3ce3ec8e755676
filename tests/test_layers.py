"""Imports between packages: a package imports only from the packages below it."""

import ast
import re
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from scripts.draw_structure import PICTURE, Structure, drawn, statements, structure

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "configs": set(),
    "kernels": set(),
    "models": {"configs", "kernels"},
    "parallel": {"configs", "kernels", "models"},
    "train": {"configs", "kernels", "models", "parallel"},
    "serve": {"configs", "kernels", "models", "parallel"},
    "launch": {"configs"},
    "scripts": {"configs", "kernels", "models", "parallel", "train", "serve", "launch"},
}
ROOMS: dict[str, set[str]] = {
    "configs": {"configs/health"},
    "configs/health": {"configs"},
    "kernels": set(),
    "kernels/quantization": {"kernels"},
    "kernels/gemm": {"kernels", "kernels/quantization"},
    "kernels/grouped_gemm": {"kernels", "kernels/gemm", "kernels/quantization"},
    "kernels/layers": {"kernels"},
    "kernels/mlp": {
        "kernels", "kernels/gemm", "kernels/grouped_gemm", "kernels/quantization",
    },
    "kernels/fused_cpu": {"kernels"},
    "kernels/moe": {"kernels"},
    "kernels/paged_attention": {"kernels", "kernels/gemm"},
    # upcycling checks which architecture can express the result
    "models": {"models/hf", "models/layers"},
    "models/layers": set(),
    "models/hf": {"models", "models/hf/config", "models/hf/families", "models/layers"},
    "models/hf/config": {"models/hf"},
    "models/hf/families": {"models/hf", "models/hf/config"},
    "models/gguf": {"models/hf"},
    "parallel": {"parallel/dispatch", "parallel/fsdp"},
    "parallel/fsdp": {"parallel"},
    "parallel/dispatch": {"parallel"},
    "parallel/memory": {"parallel", "parallel/dispatch", "parallel/fsdp"},
    "train": {
        "train/checkpoint", "train/checkpoint/storage", "train/data", "train/dataset",
        "train/health", "train/optim", "train/process", "train/report", "train/tokenizer",
    },
    "train/checkpoint": {"train", "train/checkpoint/storage", "train/optim"},
    "train/checkpoint/storage": {"train", "train/checkpoint"},
    "train/convert": {"train", "train/checkpoint", "train/tokenizer"},
    "train/data": {"train", "train/dataset", "train/tokenizer"},
    "train/dataset": {"train", "train/data"},
    "train/health": {"train", "train/dataset", "train/report"},
    "train/prepare": {"train", "train/data", "train/dataset", "train/tokenizer"},
    "train/process": set(),
    "train/report": {"train"},
    "train/tokenizer": set(),
    "launch": {"launch/supervisor"},
    "launch/supervisor": {"launch"},
    "scripts/scaling_sweep": {"scripts/scaling_report"},
    "scripts/bench_growth": {"scripts/bench_train"},
    "scripts/check_clients": {"scripts/bench_serve"},
    "scripts/gpu_suite": {"scripts/gpu_suite/runner"},
    "scripts/gpu_suite/runner": {"scripts/gpu_suite"},
    "serve": {"serve/api", "serve/bench", "serve/engine", "serve/frontend", "serve/tool_calls"},
    "serve/api": {"serve/engine", "serve/frontend", "serve/grammar", "serve/page", "serve/text",
                  "serve/tool_calls"},
    "serve/page": {"serve/api"},
    "serve/bench": set(),
    "serve/frontend": {"serve/cache", "serve/engine", "serve/grammar"},
    "serve/engine": {"serve/cache", "serve/cuda", "serve/grammar", "serve/text"},
    "serve/cuda": {"serve/cache", "serve/engine"},
    "serve/cache": set(),
    "serve/grammar": {"serve/text"},
    "serve/text": {"serve/engine"},
    "serve/tool_calls": {"serve/text"},
}  # fmt: skip
"""The other subpackages of a package that each subpackage may import; none if it is not listed."""
MOST_FILES = 16
NO_TORCH = ("configs", "launch")
parse = cache(ast.parse)


@cache
def rooms() -> Structure:
    with patch("ast.parse", parse):  # of files that other tests have parsed
        return structure()


@cache
def tree_of(path: Path) -> ast.Module:
    return parse(path.read_text())


@cache
def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in statements(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_no_import_runs_back_up(folder: str) -> None:
    assert files_of(folder), f"{folder} is empty"
    rooms = MAY_IMPORT.keys() | {"tests"}
    for path in files_of(folder):
        found = {name.split(".")[0] for name in imported_modules(path)} & rooms
        extra = found - MAY_IMPORT[folder] - {folder}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_rooms_import_what_the_table_says() -> None:
    found = {
        room: {name for name in inside["imports"] if name.split("/")[0] == room.split("/")[0]}
        for room, inside in rooms().items()
    }
    extra = {room: names - ROOMS.get(room, set()) for room, names in found.items()}
    assert not {room: names for room, names in extra.items() if names}
    unused = {room: names - found.get(room, set()) for room, names in ROOMS.items()}
    assert not {room: names for room, names in unused.items() if names}


def test_one_file_of_serving_knows_ranks() -> None:
    """Scheduler, cache, sampler and HTTP are those of one process; the command reads the launcher's
    variables, and the package sets those of libraries."""
    users = {
        str(path.relative_to(ROOT))
        for path in files_of("serve")
        if any(name.startswith("parallel") for name in imported_modules(path))
    }
    package = {"serve/__init__.py", "serve/__main__.py"}
    assert users == package | {"serve/server.py", "serve/engine/rank_group.py"}


def test_rooms_are_small_and_say_what_is_in_them() -> None:
    for room, inside in rooms().items():
        assert len(inside["files"]) <= MOST_FILES, room
        said = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
        assert said, f"{room}/__init__.py has no docstring"


def test_tests_mirror_the_rooms() -> None:
    """A folder of tests has at most as many files as a room."""
    for folder in (ROOT / "tests").rglob("*"):
        if folder.is_dir() and folder.name != "__pycache__":
            assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


def test_the_picture_of_the_structure_is_that_of_the_imports() -> None:
    assert drawn(PICTURE) == rooms(), "run python -m scripts.draw_structure"


def test_no_import_circles() -> None:
    paths = [path for folder in MAY_IMPORT for path in files_of(folder)]
    module_of = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }
    graph = {name: imported_modules(path) & module_of.keys() for name, path in module_of.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_folder_is_missing_from_the_table() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= MAY_IMPORT.keys() | {"tests"}


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in [*MAY_IMPORT, "tests"]
        for path in files_of(folder)
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_the_schema_needs_the_standard_library_only() -> None:
    for folder in NO_TORCH:
        for path in files_of(folder):
            roots = {name.split(".")[0] for name in imported_modules(path)}
            third = roots - set(sys.stdlib_module_names) - {*NO_TORCH, "tomli", "tomli_w"}
            assert not third, f"{path.name} imports {third}"


def test_no_pickle() -> None:
    banned = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
    calls = r"torch[\s\\]*\.[\s\\]*(load|save)|dist[\s\\]*\.[\s\\]*\w*object"
    names = re.compile(rf"\b({'|'.join(banned)}|{calls})")
    for folder in [*MAY_IMPORT, "tests"]:
        for path in files_of(folder):
            text = path.read_text()
            if not names.search(text):  # parsing takes time
                continue
            assert not imported_modules(path) & banned, path
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    call = f"{node.value.id}.{node.attr}"
                    assert call not in ("torch.load", "torch.save"), f"{path}: {call}"
                    assert not (node.value.id == "dist" and "object" in node.attr), (
                        f"{path}: {call}"
                    )


def test_kernels_is_ours() -> None:
    import kernels

    assert Path(kernels.__file__ or "").is_relative_to(ROOT), f"kernels is {kernels.__file__}"
