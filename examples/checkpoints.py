"""What the prepare_*.py scripts have in common: a checkpoint folder that is there whole, or not at all."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def make_checkpoint(
    description: str, default: Path, find: Callable[[], Path], fill: Callable[[Path, Path], None]
) -> None:
    """Make the checkpoint that `--output` names, from what an installed package holds.

    A finished one is left as it is; an interrupted run leaves none behind, since the folder gets its name only when it
    is complete.

    Args:
        description (`str`): Of the script, for `--help`.
        default (`Path`): The folder, where none is named.
        find (`Callable`): Gives the source, or stops with what to install.
        fill (`Callable`): Writes the checkpoint of a source into a folder.
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
