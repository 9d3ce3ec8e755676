"""Modules are not modified from outside: their class and `forward` are never replaced, and code
outside of a class's file sets only those attributes that are interfaces for parallelism.

Checked in the source: a name refers to a module if it is annotated so, created by a module's class,
checked by `isinstance`, or iterates over `modules()` and similar calls.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from scripts.draw_structure import statements

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "kernels", "models", "parallel", "train", "serve", "scripts")
LISTS = {
    "modules", "named_modules", "children", "named_children", "blocks", "routers", "fp8_modules",
}  # fmt: skip
"""Calls that return modules, or names with modules."""
MADE = "get_submodule"
"""A call that returns one."""
SEAMS = {"dispatcher", "embed", "recompute_h", "runner", "tp_comm"}
"""Attributes that `parallel` sets; the class of the module declares them."""
BUFFERS = {"parallel/apply.py"}
"""Files that set attributes by variable names: buffers that get their memory."""
FOREIGN = {("scripts/check_readers/with_openvino.py", "forward")}
"""A class of transformers that a reader of exports changes; not one of ours."""
Found = tuple[int, str, str]
"""Line, target of the assignment, attribute; "?" if it is not a constant."""


def files() -> list[str]:
    return [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


@cache
def text_of(file: str) -> str:
    return (ROOT / file).read_text()


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse(text_of(file))


@cache
def module_classes() -> dict[str, set[str]]:
    """The classes that are `nn.Module`s, with the files of each; torch's classes have none."""
    classes: dict[str, list[tuple[str, set[str]]]] = {}
    for file in files():
        if not re.search(r"^ *class \w+\(", text_of(file), re.MULTILINE):  # parsing takes time
            continue
        for node in statements(tree_of(file)):
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


@cache
def declared(file: str) -> frozenset[str]:
    """The attributes that module classes of a file set on their instances."""
    found = set()
    for node in statements(tree_of(file)):
        if isinstance(node, ast.ClassDef) and file in module_classes().get(node.name, ()):
            found |= {name for _, holder, name in assigned(node) if holder == "self"}
            found |= {ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign)}
    return frozenset(found)


def modules_in(function: ast.AST) -> set[str]:
    """The names that refer to modules, or to several."""
    known, found = module_classes(), set[str]()

    def told(node: ast.AST | None) -> bool:
        return node is not None and any(last(n) in known for n in ast.walk(node))

    def listed(node: ast.AST) -> bool:
        """Whether an expression gives modules: a call that does, a list of them, or something built
        from lists."""
        if isinstance(node, ast.Call):
            plain = isinstance(node.func, ast.Name)  # zip, enumerate
            return last(node.func) in LISTS or (plain and any(map(listed, node.args)))
        if isinstance(node, ast.ListComp):
            return any(listed(generator.iter) for generator in node.generators)
        if isinstance(node, ast.Subscript):
            return listed(node.value)
        return isinstance(node, ast.Name) and node.id in found

    for node in [*ast.walk(function)] * 2:  # a list may be annotated after its use
        if isinstance(node, ast.arg) and told(node.annotation):
            found.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and told(node.annotation):
            found.add(ast.unparse(node.target))
        elif isinstance(node, ast.Call) and last(node.func) == "isinstance" and told(node.args[1]):
            found.add(ast.unparse(node.args[0]))
        elif isinstance(node, ast.Assign):
            value = node.value
            made = isinstance(value, ast.Call) and last(value.func) in {*known, MADE}
            if made or listed(value):
                found |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.For | ast.comprehension) and listed(node.iter):
            found |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
    return found - {"self"}


def from_outside(tree: ast.Module, own: frozenset[str]) -> list[Found]:
    """Attributes of modules that are set, except those of the file's own classes."""
    seen = set[Found]()
    for function in statements(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        # `self` is no module from outside
        changes = [c for c in assigned(function) if c[1] != "self" and c[2] not in own]
        held = modules_in(function) if changes else set()
        for line, holder, name in changes:
            parts = holder.split(".")
            if any(".".join(parts[: n + 1]) in held for n in range(len(parts))):
                seen.add((line, holder, name))
    return sorted(seen)


def test_no_class_and_no_forward_is_replaced() -> None:
    found = {
        (file, name): line
        for file in files()
        if re.search(r"\b(__class__|forward)\b", text_of(file))  # parsing takes time
        for line, _, name in assigned(tree_of(file))
        if name in ("__class__", "forward")
    }
    assert found.keys() == FOREIGN, found


def test_modules_are_changed_at_the_seams_of_parallelism_alone() -> None:
    used = set()
    holders = re.compile(rf"\b({'|'.join([*module_classes(), *LISTS, MADE])})\b")
    for file in files():
        if not holders.search(text_of(file)):  # no name of it can refer to a module
            continue
        parallel = file.startswith("parallel/")
        own = frozenset[str]() if parallel else declared(file)
        for line, holder, name in from_outside(tree_of(file), own):
            at_seam = name in SEAMS or (name == "?" and file in BUFFERS)
            assert parallel and at_seam, f"{file}:{line}: {holder}.{name} = ..."
            used.add(name)
    assert used == SEAMS | {"?"}, "a seam that nobody uses"


def test_the_seams_are_declared_by_classes() -> None:
    models = [file for file in files() if file.startswith("models/")]
    assert SEAMS <= set().union(*map(declared, models))


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
        ("def f(x):\n    y = [m for m in x.modules() if m]\n    for m in y:\n        m.a = 1", "a"),
        ("def f(x):\n    for m, i in zip(routers(x), x):\n        m.a = 1", "a"),
        ("def f(router: Router):\n    router.bias_E += 1", "bias_E"),
        ("def f(m: Experts):\n    for p in m.parameters():\n        p.grad = None", ""),
        ("def f(tokenizer: Tokenizer):\n    tokenizer.decoder = 1", ""),
        ("def f(model: Decoder):\n    x = model.embed\n    return x", ""),
    ],
)
def test_the_rule_sees(code: str, expected: str) -> None:
    found = [name for *_, name in from_outside(ast.parse(code), frozenset())]
    assert found == ([expected] if expected else [])


def test_a_file_may_change_what_its_own_classes_declare() -> None:
    code = "def f(router: Router):\n    router.bias_E += 1\n    router.other = 1"
    found = from_outside(ast.parse(code), declared("models/router.py"))
    assert [name for *_, name in found] == ["other"]


@pytest.mark.parametrize(
    "code",
    ["x.__class__ = A", "x.a.forward = f", "setattr(x, 'forward', f)", "y, x.__class__ = 1, A",
     "object.__setattr__(x, '__class__', A)"],
)  # fmt: skip
def test_replacements_are_seen(code: str) -> None:
    assert {name for *_, name in assigned(ast.parse(code))} & {"__class__", "forward"}
