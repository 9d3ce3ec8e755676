"""Every public function of `kernels/` is used by the product: configs, models, parallel, train or
serve reach it through the calls of other kernels. A function used only by tests and benchmarks is
dead code.

Determined from the source: a definition reaches the names in its body. The plain-torch reference of
a kernel counts as used if its kernel is.
"""

import ast
import functools
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("configs", "models", "parallel", "train", "serve")
WAITING = {"kernels.gemm.gemm_fp8_gluon.gemm": "measurement on a Hopper GPU decides"}
"""Functions that no run selects yet, and why they are kept."""

Names = dict[str, str]
"""Names of a module: from the local name to the full name."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> Names:
    """The names that the imports in a piece of code bind."""
    names: Names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernels"):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.asname or a.name: a.name for a in node.names if "kernels" in a.name}
    return names


def named(node: ast.AST, names: Names) -> set[str]:
    """Full names in a piece of code, also as `module.name`. names: those of the surrounding
    code."""
    names = names | imported(node)
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in names:
            found.add(names[part.id])
        elif isinstance(part, ast.Attribute) and (owner := dotted(part.value)):
            found.add(f"{names.get(owner, owner)}.{part.attr}")
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c`; empty for any other expression, which is no name of a module."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def reaches(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """From every top-level name of `kernels/` to the names in its definition."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module, tree in trees.items():
        names: Names = {}
        for statement in tree.body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                names[statement.name] = f"{module}.{statement.name}"
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                for part in ast.walk(statement):
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                        names[part.id] = f"{module}.{part.id}"
            else:
                names |= imported(statement)
        for statement in tree.body:
            mentioned = named(statement, names)
            if isinstance(statement, ast.FunctionDef | ast.ClassDef) and statement.name != "_":
                graph[f"{module}.{statement.name}"] |= mentioned
                continue
            # an operation's meta implementation and gradients are registered under its name
            for name in mentioned:
                graph[name] |= mentioned
    return graph


def reached(graph: dict[str, set[str]], roots: frozenset[str]) -> set[str]:
    done: set[str] = set()
    left = set(roots)
    while left:
        name = left.pop()
        done.add(name)
        found = set(graph.get(name, ()))
        if f"{name}_reference" in graph:
            found.add(f"{name}_reference")
        left |= found - done
    return done


@functools.cache
def roots() -> frozenset[str]:
    """Full names that the product uses."""
    found: set[str] = set()
    for floor in PRODUCT:
        for path in sorted((ROOT / floor).rglob("*.py")):
            text = path.read_text()
            # without an import of it a name of `kernels` cannot be meant, and parsing takes time
            if "kernels" in text:
                tree = ast.parse(text)
                found |= named(tree, {}) | set(imported(tree).values())
    return frozenset(found)


def public(trees: dict[str, ast.Module]) -> set[str]:
    return {
        f"{module}.{statement.name}"
        for module, tree in trees.items()
        for statement in tree.body
        if isinstance(statement, ast.FunctionDef | ast.ClassDef)
        and not statement.name.startswith("_")
    }


def unused(trees: dict[str, ast.Module]) -> set[str]:
    graph = reaches(trees)
    for name in WAITING:
        graph.pop(name, None)
    for mentioned in graph.values():
        mentioned.difference_update(WAITING)
    return public(trees) - reached(graph, roots())


def kernels() -> dict[str, ast.Module]:
    files = sorted((ROOT / "kernels").rglob("*.py"))
    return {module_of(path): ast.parse(path.read_text()) for path in files}


def test_every_public_kernel_has_a_user_in_the_product() -> None:
    assert sorted(unused(kernels())) == sorted(WAITING)


def test_a_kernel_without_users_is_seen() -> None:
    """Also if another unused function calls it, or if it is registered as an operation."""
    trees = kernels()
    trees["kernels.layers.norm"].body += ast.parse(
        "def alone(x): return below(x)\n"
        "def below(x): return rms_norm(x, None, 0.0)\n"
        "@torch.library.custom_op('phalanx::alone', mutates_args=())\n"
        "def operation(x): return alone(x)\n"
        "@operation.register_fake\n"
        "def _(x): return x\n"
        "def rms_norm_fast(x): return x\n"
    ).body
    added = {f"kernels.layers.norm.{n}" for n in ("alone", "below", "operation", "rms_norm_fast")}
    assert unused(trees) == added | WAITING.keys()
