"""`python -m scripts.draw_structure [OUT.png]`: floors, rooms and imports, drawn from the code.

A floor is a folder of the checkout, a room a folder within it. Arrows lead to the next level; the
text of a floor lists all that it imports. The picture contains the graph it was drawn from as text
(PNG key `structure`), so that a test detects when the two differ.
"""

import ast
import json
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "structure.png"
LEVELS = [
    ["scripts"], ["train", "serve", "launch"], ["parallel"], ["models"], ["configs", "kernels"],
]  # fmt: skip
"""The floors from top to bottom; those of one level do not import each other."""
Structure = dict[str, dict[str, list[str]]]
"""Room -> its own `files` and the rooms it `imports` from."""
_KEY = "structure"
_INK, _PAPER, _ROOM = "#263238", "#eceff1", "#ffffff"


def modules() -> dict[str, Path]:
    """Every module of the floors by its dotted name; a package is its `__init__`."""
    found = {}
    for floor in (name for level in LEVELS for name in level):
        for path in sorted((ROOT / floor).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements at any depth, without their expressions, which are most of a tree."""
    left: list[ast.AST] = [*tree.body]
    while left:
        node = left.pop()
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            left += getattr(node, name, [])


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, of modules and of names within them alike."""
    names = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str:
    """`train.data.corpus` -> `train/data`; `train.step` -> `train`."""
    parts = module.split(".")
    is_package = (ROOT / Path(*parts)).is_dir()
    return "/".join(parts if is_package else parts[:-1]) or parts[0]


def structure() -> Structure:
    """Per room its own files and the other rooms that it imports from."""
    known = modules()
    rooms: dict[str, dict[str, set[str]]] = {}
    for name, path in known.items():
        room = rooms.setdefault(room_of(name), {"files": set(), "imports": set()})
        room["files"].add(path.name)
        for imported in imports(path) & known.keys():
            # a room's `__init__` contains only its docstring: it is never the imported module
            if not (ROOT / Path(*imported.split("."))).is_dir():
                room["imports"].add(room_of(imported))
    return {
        name: {
            "files": sorted(room["files"] - {"__init__.py"}),
            "imports": sorted(room["imports"] - {name}),
        }
        for name, room in sorted(rooms.items())
    }


def drawn(picture: Path) -> Structure:
    """The structure from which a picture was drawn."""
    from PIL import Image

    with Image.open(picture) as image:
        found: Structure = json.loads(image.info[_KEY])
    return found


def draw(rooms: Structure, picture: Path) -> None:
    """A band per level, a box per floor with its rooms in it, an arrow per import of a floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(15, 2.6 * len(LEVELS)), layout="constrained")
    top = {}
    for level, floors in enumerate(LEVELS):
        inside_of = {f: [name for name in rooms if name.split("/")[0] == f] for f in floors}
        share = 15 / sum(len(inside) + 1.5 for inside in inside_of.values())
        begin = 0.0
        for floor, inside in inside_of.items():
            width = share * (len(inside) + 1.5)
            left, low = begin + 0.2, 2.6 * (len(LEVELS) - level - 1) + 0.25
            begin += width
            top[floor] = left + width / 2 - 0.2, low, low + 2.0
            _box(axis, left, low, width - 0.4, 2.0, _PAPER)
            axis.text(left + 0.12, low + 1.86, floor, fontsize=13, weight="bold", va="top")
            below = ", ".join(_imported_floors(rooms, floor)) or "nothing of ours"
            axis.text(left + width - 0.55, low + 1.84, f"imports {below}", va="top", ha="right")
            _rooms(axis, rooms, inside, left + 0.12, low + 0.1, width - 0.64)
    for above, below_it in pairwise(LEVELS):
        for floor in above:
            to = [name for name in _imported_floors(rooms, floor) if name in below_it]
            _arrows(axis, top, floor, to)
    axis.set_xlim(0, 15)
    axis.set_ylim(0, 2.6 * len(LEVELS))
    axis.axis("off")
    figure.savefig(picture, dpi=90, metadata={_KEY: json.dumps(rooms, sort_keys=True)})
    pyplot.close(figure)


def _rooms(
    axis: Any, rooms: Structure, inside: list[str], left: float, low: float, width: float
) -> None:
    step = width / len(inside)
    for i, name in enumerate(inside):
        _box(axis, left + i * step, low, step - 0.08, 1.42, _ROOM)
        files = [file.removesuffix(".py") for file in rooms[name]["files"]]
        title = name.partition("/")[2] or "at its top"
        axis.text(left + i * step + 0.07, low + 1.36, title, fontsize=9, weight="bold", va="top")
        fitting, longest = step * 14.8, max(len(file) for file in files) + 1
        columns = int(max(fitting, longest))
        lines = textwrap.wrap(", ".join(files), columns, break_long_words=False)
        if len(lines) > 7:
            lines = [*lines[:6], lines[6][: columns - 2] + " ..."]
        size = 7 * min(1.0, fitting / longest)
        axis.text(
            left + i * step + 0.07, low + 1.15, "\n".join(lines),
            fontsize=size, va="top", color=_INK,
        )  # fmt: skip


def _imported_floors(rooms: Structure, floor: str) -> list[str]:
    inside = [room for name, room in rooms.items() if name.split("/")[0] == floor]
    return sorted({name.split("/")[0] for room in inside for name in room["imports"]} - {floor})


def _arrows(
    axis: Any, top: dict[str, tuple[float, float, float]], floor: str, to: list[str]
) -> None:
    """From the lower edge of a floor to the upper edges of floors of the next level."""
    x, low, _ = top[floor]
    for target in to:
        to_x, _, high = top[target]
        near = (x + to_x) / 2 if len(to) > 1 or x != to_x else x
        axis.annotate(
            "", (near if len(to) == 1 else to_x, high), (near, low),
            arrowprops={"arrowstyle": "-|>", "color": _INK, "lw": 1.4},
        )  # fmt: skip


def _box(axis: Any, left: float, low: float, width: float, height: float, color: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    axis.add_patch(
        FancyBboxPatch(
            (left, low),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=color,
            edgecolor="#90a4ae",
        )
    )


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__)
        return 2
    picture = Path(arguments[0]) if arguments else PICTURE
    draw(structure(), picture)
    print(f"drew {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
