"""The schema as a Markdown page: every section, key, type, default and its documentation."""

import ast
import inspect
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs import schema


def reference() -> str:
    """Markdown made from `configs.schema`, so that the two always match."""
    lines = [
        "# Settings",
        "",
        "Made by `python -m configs --reference > docs/config.md`; edit `configs/schema.py`.",
        "Every key can be set in the TOML file or as `--section.key=value`.",
    ]
    for section, kind in _sections(schema.JobConfig, ""):
        lines += [
            "",
            f"## {section}",
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        docs, hints = field_docs(kind), get_type_hints(kind)
        for spec in fields(kind):
            if not is_dataclass(hints[spec.name]):
                row = (
                    spec.name,
                    _type_name(hints[spec.name]),
                    _default(spec),
                    docs.get(spec.name, ""),
                )
                lines.append(f"| `{row[0]}` | {row[1]} | {row[2]} | {row[3]} |")
    return "\n".join(lines) + "\n"


def _sections(kind: Any, prefix: str) -> list[tuple[str, Any]]:
    """Title and dataclass of each section; one of several tables has two brackets, as in TOML."""
    found = []
    for name, hint in get_type_hints(kind).items():
        dotted = prefix + name
        if is_dataclass(hint):
            found += [(f"[{dotted}]", hint), *_sections(hint, f"{dotted}.")]
        elif table := _tables(hint):
            found += [(f"[[{dotted}]]", table), *_sections(table, f"{dotted}.")]
    return found


def _tables(hint: Any) -> Any:
    """The dataclass of a list of tables; None for other types."""
    item = get_args(hint)[0] if get_origin(hint) is tuple else None
    return item if is_dataclass(item) else None


def field_docs(kind: Any) -> dict[str, str]:
    """The string that follows each annotated field in the source."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return "list of tables" if _tables(kind) else f"list of {_type_name(get_args(kind)[0])}"
    return {int: "integer", float: "number", bool: "boolean", str: "string"}[kind]


def _default(spec: "Field[Any]") -> str:
    if spec.default is MISSING:
        return "required"
    value = str(spec.default).lower() if isinstance(spec.default, bool) else spec.default
    return f"`{list(value) if isinstance(value, tuple) else value}`" if value != "" else "empty"
