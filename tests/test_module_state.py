"""A module stays what its class says: nobody gives it another class or another `forward`, and what
lies outside of its file sets its attributes at the seams of parallelism alone.

By syntax: a name holds a module where it is annotated so, made by a module's class, checked by
`isinstance`, or runs over `modules()` and the like.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "kernels", "models", "parallel", "train", "serve", "scripts")
LISTS = {"modules", "named_modules", "children", "named_children", "blocks", "routers"}
"""Calls that give modules, or names with modules."""
SEAMS = {"dispatcher", "embed", "recompute_h", "runner", "tp_comm"}
"""What `parallel` sets; the class of the module declares it."""
BUFFERS = {"parallel/apply.py"}
"""Files that set attributes whose names are not written there: buffers that get their memory."""
FOREIGN = {("scripts/check_readers/with_openvino.py", "forward")}
"""A class of transformers, changed for the reader's export; nothing of ours."""
Found = tuple[int, str, str]
"""Line, what is assigned to, the attribute; "?" where that is not a constant."""


def files() -> list[str]:
    return [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


@cache
def module_classes() -> dict[str, set[str]]:
    """The classes that are `nn.Module`s, with the files of each; those of torch with none."""
    classes: dict[str, list[tuple[str, set[str]]]] = {}
    for file in files():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ClassDef):
                bases = {last(base) for base in node.bases}
                classes.setdefault(node.name, []).append((file, bases))
    found: dict[str, set[str]] = {
        name: set() for name in ("Module", "Linear", "Embedding", "ModuleList", "FSDPModule")
    }
    while True:
        more: dict[str, set[str]] = {name: set() for name in found}
        for name, places in classes.items():
            if inside := {file for file, bases in places if bases & found.keys()}:
                more[name] = inside
        if more == found:
            return found
        found = more


def last(node: ast.AST) -> str:
    """`c` of `a.b.c`."""
    if isinstance(node, ast.Constant):
        return str(node.value).split(".")[-1]
    return getattr(node, "attr", getattr(node, "id", ""))


def assigned(tree: ast.AST) -> Iterator[Found]:
    """Every attribute that is set or deleted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield node.lineno, ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and last(node.func).strip("_") in ("setattr", "delattr"):
            constant = node.args[1].value if isinstance(node.args[1], ast.Constant) else "?"
            yield node.lineno, ast.unparse(node.args[0]), str(constant)


def modules_in(function: ast.AST) -> dict[str, str]:
    """The names that hold modules, with the class of each as far as it is told."""
    known, found = module_classes(), dict[str, str]()

    def told(node: ast.AST | None) -> str:
        return next((last(n) for n in ast.walk(node) if last(n) in known), "") if node else ""

    for node in ast.walk(function):
        if isinstance(node, ast.arg) and told(node.annotation):
            found[node.arg] = told(node.annotation)
        elif isinstance(node, ast.AnnAssign) and told(node.annotation):
            found[ast.unparse(node.target)] = told(node.annotation)
        elif isinstance(node, ast.Call) and last(node.func) == "isinstance" and told(node.args[1]):
            found[ast.unparse(node.args[0])] = told(node.args[1])
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called = last(node.value.func)
            if called in known or called == "get_submodule":
                found |= {ast.unparse(target): called for target in node.targets}
        elif isinstance(node, ast.For | ast.comprehension):
            calls = {last(n.func) for n in ast.walk(node.iter) if isinstance(n, ast.Call)}
            if calls & LISTS:
                names = [n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)]
                found |= dict.fromkeys(names[-1:], "Module")
    found.pop("self", None)
    return found


def from_outside(tree: ast.Module, file: str) -> Iterator[Found]:
    """Attributes of modules that are set where their class is not defined."""
    seen = set[Found]()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        if not (changes := list(assigned(function))):
            continue
        held = modules_in(function)
        for line, holder, name in changes:
            parts = holder.split(".")
            prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            kind = next((held[prefix] for prefix in prefixes if prefix in held), None)
            if kind is not None and file not in module_classes().get(kind, ()):
                seen.add((line, holder, name))
    yield from sorted(seen)


def test_no_class_and_no_forward_is_replaced() -> None:
    found = {
        (file, name): line
        for file in files()
        for line, _, name in assigned(tree_of(file))
        if name in ("__class__", "forward")
    }
    assert found.keys() == FOREIGN, found


def test_modules_are_changed_at_the_seams_of_parallelism_alone() -> None:
    used = set()
    for file in files():
        for line, holder, name in from_outside(tree_of(file), file):
            at_seam = name in SEAMS or (name == "?" and file in BUFFERS)
            assert file.startswith("parallel/") and at_seam, f"{file}:{line}: {holder}.{name} = ..."
            used.add(name)
    assert used == SEAMS | {"?"}, "a seam that nobody uses"


def test_the_seams_are_declared_by_classes() -> None:
    declared = set()
    for file in files():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ClassDef) and file in module_classes().get(node.name, ()):
                declared |= {name for _, holder, name in assigned(node) if holder == "self"}
                declared |= {
                    ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign)
                }
    assert declared >= SEAMS


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(model: nn.Module):\n    model.state = 1", "state"),
        ("def f(block: 'Block'):\n    block.ffn.scope = 1", "scope"),
        ("def f(x):\n    for m in x.modules():\n        m.a, y = 1, 2", "a"),
        ("def f(x):\n    for name, m in x.named_modules():\n        m.a += 1", "a"),
        ("def f(x):\n    if isinstance(x, Router):\n        setattr(x, 'bias_E', 0)", "bias_E"),
        ("def f(x):\n    y = Decoder(x)\n    setattr(y.norm, name, 0)", "?"),
        ("def f(x):\n    y = x.get_submodule('ffn')\n    del y.router", "router"),
        ("def f(m: Experts):\n    object.__setattr__(m, 'b', 0)", "b"),
        ("def f(m: Experts):\n    def g():\n        m.b: int = 0", "b"),
        ("def f(tokenizer: Tokenizer):\n    tokenizer.decoder = 1", ""),
        ("def f(model: Decoder):\n    x = model.embed\n    return x", ""),
    ],
)
def test_the_rule_sees(code: str, expected: str) -> None:
    assert [name for *_, name in from_outside(ast.parse(code), "here.py")] == [expected] * bool(
        expected
    )


@pytest.mark.parametrize(
    "code",
    ["x.__class__ = A", "x.a.forward = f", "setattr(x, 'forward', f)", "y, x.__class__ = 1, A",
     "object.__setattr__(x, '__class__', A)"],
)  # fmt: skip
def test_replacements_are_seen(code: str) -> None:
    assert {name for *_, name in assigned(ast.parse(code))} & {"__class__", "forward"}
