"""The texts of errors and warnings in the code, read from its syntax: `…` stands for each value that is filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from paths import REPOSITORY


GAP = "…"
WARNS = ("warn", "warning", "_reject")


@dataclass(frozen=True)
class Site:
    """A place that raises an error or warns. Empty text: it says what another place wrote."""

    file: str
    function: str
    line: int
    text: str


def modules() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("peft_reft", "peft_reft_autoload", "peft_reft_cli", "integrations"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            yield str(path.relative_to(REPOSITORY)), ast.parse(path.read_text())


def text_of(node: ast.expr | None, names: dict[str, ast.expr]) -> str:
    """The text of an expression, with a gap for each part that is known at run time only."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, names) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, names) + text_of(node.right, names)
    if isinstance(node, ast.Name) and node.id in names:
        return text_of(names[node.id], {key: value for key, value in names.items() if key != node.id})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return re.sub(r"\{[^}]*\}", GAP, text_of(node.func.value, names))
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return text_of(node.value, names) if node.value.id in names else GAP
    return GAP


def closed(text: str) -> str:
    """One gap where several meet."""
    return re.sub(f"{GAP}+", GAP, text)


def assigned(tree: ast.AST) -> dict[str, ast.expr]:
    """What names are set to, where that is one text: constants of a module, and variables that a function builds."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            if isinstance(node.value, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                found[node.targets[0].id] = node.value
    return found


def error_made(node: ast.AST) -> ast.Call | None:
    """The call that makes an error, where a statement raises or returns one."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return node.exc
    made = node.value if isinstance(node, ast.Return) else None
    return made if isinstance(made, ast.Call) and ast.unparse(made.func).endswith("Error") else None


def sites() -> list[Site]:
    """All places that raise an error with a text of their own, or warn."""
    found = []
    for file, tree in modules():
        names = assigned(tree)
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        for node in ast.walk(tree):
            if (error := error_made(node)) is not None:
                argument = error.args[0] if error.args else None
            elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in WARNS:
                argument = node.args[0] if node.args else None
            else:
                continue
            inside = [one.name for one in functions if one.lineno <= node.lineno <= (one.end_lineno or 0)]
            text = closed(text_of(argument, names)).strip()
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "_reject":
                text = f"{text}={GAP} is not allowed. Allowed: {closed(text_of(node.args[2], names))}."
            found.append(Site(file, inside[-1] if inside else "", node.lineno, "" if text == GAP else text))
    return found


def texts() -> list[str]:
    """All texts in the code but docstrings, with gaps."""
    found = []
    for _, tree in modules():
        names = assigned(tree)
        found += [
            closed(text_of(node, names))
            for node in ast.walk(tree)
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))
        ]
    return found
