"""Shared by the prepare_*.py scripts: makes a checkpoint's folder, complete or not at all."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def make_checkpoint(
    description: str, default: Path, find: Callable[[], Path], fill: Callable[[Path, Path], None]
) -> None:
    """Make a checkpoint in the folder that `--output` names, from files of an installed package.

    A finished checkpoint is left as it is. An interrupted run leaves none: the folder gets its name when it is
    complete.

    Args:
        description (`str`): The script's description, for `--help`.
        default (`Path`): The folder without `--output`.
        find (`Callable`): Returns the source's path, or exits with a message that says what to install.
        fill (`Callable`): Called with the source and a folder, writes the checkpoint into the folder.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=default, help="folder of the checkpoint (default: %(default)s)")
    output = parser.parse_args().output
    if (output / "config.json").is_file():
        print(f"{output} is there already.")
        return
    if output.exists():
        raise SystemExit(f"{output} exists, but has no config.json. Move it away, or pass another --output.")
    source = find()
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{output.name}.unfinished-", dir=output.parent))
    try:
        fill(source, unfinished)
        unfinished.chmod(0o755)  # mkdtemp made it private
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"Saved {output} ({size / 1e6:,.0f} MB).")
