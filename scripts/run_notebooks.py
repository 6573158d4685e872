#!/usr/bin/env python3
"""Runs the notebooks of examples/notebooks, and with --write keeps what they print in them.

    python scripts/run_notebooks.py --base outputs/SmolLM2-135M-Instruct --write [NAME ...]

Kept are the texts that a reader of the page wants to see: what cells print. Warnings, progress and times stay out, so
that a notebook changes in the repository only where its code or its results do. tests/examples/test_notebooks.py runs
them, too.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


# What libraries log to standard output: lines with a time, and Trainer's dicts, whose losses the notebooks print.
LOGGED = re.compile(r"^(?:\[\d{4}-|\{').*\n", re.MULTILINE)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"


def run(path: Path, base: str, folder: str) -> nbformat.NotebookNode:
    """A notebook with its outputs, run in `folder` on the base model of the folder `base`. Raises nbclient's
    CellExecutionError, with the cell and the traceback, where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    os.environ.update(PEFT_REFT_BASE=str(Path(base).resolve()), HF_HUB_OFFLINE="1")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
    return tidied(notebook)


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with the printed text as its only outputs, and nothing in it that differs from run to run. Of what
    rich shows in colour, its plain text."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            text = "".join(printed(output) for output in cell.outputs)
            cell.outputs = [nbformat.v4.new_output("stream", text=text)] if text.strip() else []
    return notebook


def printed(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return LOGGED.sub("", output.text) if output.name == "stdout" else ""
    text = output.get("data", {}).get("text/plain", "")
    return "" if text.startswith("<") else COLOUR.sub("", text)  # "<": an object without a text, as Trainer's table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="outputs/SmolLM2-135M-Instruct", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--write", action="store_true", help="write the outputs into the notebooks")
    parser.add_argument("names", nargs="*", help="such as quickstart (default: all)")
    args = parser.parse_args()
    for path in [FOLDER / f"{name}.ipynb" for name in args.names] or sorted(FOLDER.glob("*.ipynb")):
        print(path.stem, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(path, args.base, folder)
        if args.write:
            nbformat.write(notebook, path)
        else:
            print("".join(output.text for cell in notebook.cells for output in cell.get("outputs", [])))


if __name__ == "__main__":
    main()
