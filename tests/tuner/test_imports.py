"""Imports point one way: the tuner imports nothing of peft_reft outside itself, and no module in it imports upward,
not even under TYPE_CHECKING or inside a function."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import REPOSITORY


# From the bottom up. A module may import from its own row and from rows before it, never in a circle.
ROWS = [
    ["tuner.versions"],
    ["tuner.peft_api", "tuner.engines_api"],
    ["tuner.positions"],
    ["tuner.interventions"],
    ["tuner.parameters"],
    ["tuner.forward"],
    [
        "tuner.peft_type",
        "tuner.nested",
        "tuner.merging",
        "tuner.layouts",
        "tuner.chat_template",
        "tuner.strength",
        "tuner.card",
    ],
    ["tuner.config"],
    ["tuner.layer", "tuner.targets", "tuner.rules"],
    ["tuner.model"],
    ["tuner"],  # its __init__
    ["tools", "conversion", "evaluation"],
    [""],  # peft_reft/__init__
    ["integrations"],
    ["__main__"],
]
CLI = "peft_reft_cli"  # beside the package: stands on all of it, and only __main__ knows it
FOLDERS = ("tools", "conversion", "evaluation")
BESIDE = {("evaluation", "tools"), ("evaluation", "conversion")}  # data formats, and files of adapters
# What the tensor-only folders may import of other libraries, beside torch, numpy and the standard library.
TENSORS_ONLY = {
    "tuner.positions": set(),
    "tuner.interventions": {("transformers.activations", "ACT2FN")},
}
FORBIDDEN_IN_TENSORS = ("peft", "transformers", "accelerate")


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def row_of(module: str) -> int:
    """The row of a module, by the longest name that it begins with."""
    names = {name: index for index, row in enumerate(ROWS) for name in row}
    fitting = [name for name in names if module == name or (name and module.startswith(f"{name}."))]
    assert fitting, f"{module!r} is in no row of ROWS"
    return names[max(fitting, key=len)]


def imports_of(file: Path, module: str) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of every import in a file, wherever it stands. Relative modules are named from the root of
    peft_reft."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".") if package else []
                base = parts[: len(parts) - node.level + 1]
                origin = ".".join(["peft_reft", *base, *([node.module] if node.module else [])])
            else:
                origin = node.module or ""
            for alias in node.names:
                yield node.lineno, origin, alias.name


def faults(root: Path) -> list[str]:
    """Every import in peft_reft/ that breaks a rule, as file:line."""
    files = {module_of(file, root): file for file in sorted(root.rglob("*.py"))}
    found, graph = [], {module: set() for module in files}
    for module, file in files.items():
        for line, origin, name in imports_of(file, module):
            where = f"{file.relative_to(root)}:{line}"
            if origin.partition(".")[0] == CLI and module != "__main__":
                found.append(f"{where} imports upward: {CLI}")
            if origin.partition(".")[0] == "peft_reft":
                target = origin.removeprefix("peft_reft").lstrip(".")
                inner = f"{target}.{name}".lstrip(".")
                target = inner if inner in files else target
                if target not in files:  # integrations/, which lie elsewhere
                    target = "integrations"
                else:
                    graph[module].add(target)
                if row_of(target) > row_of(module):
                    found.append(f"{where} imports upward: {target}")
                folder, other = module.partition(".")[0], target.partition(".")[0]
                if folder == "tuner" != other:
                    found.append(f"{where} leaves the tuner: {target}")
                if folder in FOLDERS and other in FOLDERS and folder != other and (folder, other) not in BESIDE:
                    found.append(f"{where} goes from {folder} to {other}")
            for part, allowed in TENSORS_ONLY.items():
                outside = origin.partition(".")[0] in FORBIDDEN_IN_TENSORS
                if module.startswith(part) and outside and (origin, name) not in allowed:
                    found.append(f"{where} knows {origin}")
    return found + circles(graph)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves, by way of others."""

    def reaches(start: str, wanted: str, seen: set[str]) -> bool:
        for module in graph[start] - seen:
            seen.add(module)
            if module == wanted or reaches(module, wanted, seen):
                return True
        return False

    return [f"{module} is in a circle" for module in graph if reaches(module, module, set())]


def test_no_import_breaks_a_rule():
    assert faults(REPOSITORY / "peft_reft") == []


@pytest.mark.parametrize(
    "file, line, fault",
    [
        ("tuner/positions/batch.py", "from ..config import ReftConfig", "imports upward: tuner.config"),
        (
            "tuner/parameters/stacked.py",
            "def late():\n    from ..layer import ReftLayer",
            "imports upward: tuner.layer",
        ),
        ("tuner/merging.py", "if TYPE_CHECKING:\n    from .layer import ReftLayer", "imports upward: tuner.layer"),
        ("tuner/model.py", "from ..tools.collator import PromptLengthsCollator", "leaves the tuner: tools.collator"),
        ("tuner/positions/template.py", "from transformers import AutoTokenizer", "knows transformers"),
        ("tuner/interventions/apply.py", "from peft import PeftModel", "knows peft"),
        (
            "tuner/interventions/formulas.py",
            "from transformers.activations import ACT2CLS",
            "knows transformers.activations",
        ),
        ("tuner/positions/prompts.py", "from .batch import Batch", "tuner.positions.prompts is in a circle"),
        ("tools/collator.py", "from ..integrations import axolotl", "imports upward: integrations"),
        ("tools/explain.py", "from peft_reft_cli.options import TASKS", "imports upward: peft_reft_cli"),
        ("tools/explain.py", "from ..conversion.files import Path", "goes from tools to conversion"),
    ],
)
def test_one_line_that_breaks_a_rule_is_found(tmp_path, file, line, fault):
    root = shutil.copytree(
        REPOSITORY / "peft_reft", tmp_path / "peft_reft", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (root / file).open("a") as end:
        end.write(f"\n{line}\n")
    assert any(fault in one for one in faults(root)), faults(root)
