"""The picture of the folders in README and docs/design.md shows the folders as they are."""

from __future__ import annotations

import importlib.util

from paths import REPOSITORY


BESIDE = {"integrations", "peft_reft_autoload", "peft_reft_cli"}  # the package peft_reft


def drawing():
    spec = importlib.util.spec_from_file_location("draw_layout", REPOSITORY / "scripts" / "draw_layout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_is_in_the_picture_and_no_other():
    folders = drawing().FOLDERS
    for folder, modules in folders.items():
        where = REPOSITORY / (folder if folder in BESIDE else f"peft_reft/{folder}")
        found = {path.stem for path in where.glob("*.py")} | {
            f"{path.parent.name}/" for path in where.glob("*/__init__.py") if folder == "integrations"
        }
        assert set(modules) == found - {"__init__"}, folder
    inside = {
        path.parent.relative_to(REPOSITORY / "peft_reft").as_posix()
        for path in (REPOSITORY / "peft_reft").rglob("*.py")
    }
    assert inside - {"."} == set(folders) - BESIDE


def test_the_picture_is_what_the_script_draws():
    module = drawing()
    assert module.TARGET.read_text() == module.picture(), "run: python scripts/draw_layout.py"
