#!/usr/bin/env python3
"""Stops a release whose tag, version, change log or addresses do not agree.

    python scripts/check_release.py dist/peft_reft-0.1.0-py3-none-any.whl --tag v0.1.0 --repository https://git.example/peft-reft

Reads the wheel's metadata, as an index does. Standard library only.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path


ROOT = Path(__file__).parents[1]


def faults(wheel: Path, tag: str, repository: str) -> list[str]:
    """What does not agree, a sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    version = metadata["Version"]
    found = []
    if tag != f"v{version}":
        found.append(f"The tag is {tag}, and peft_reft/__init__.py has __version__ = {version!r}.")
    if f"\n## {version}\n" not in (ROOT / "CHANGELOG.md").read_text("utf-8"):
        found.append(f"CHANGELOG.md has no section '## {version}'.")
    if f"\nversion: {version}\n" not in (ROOT / "CITATION.cff").read_text("utf-8"):
        found.append(f"CITATION.cff has another version than {version}.")
    addresses = dict(one.split(", ", 1) for one in metadata.get_all("Project-URL", []))
    if addresses.get("Repository") != repository:
        found.append(f"setup.py has REPOSITORY = {addresses.get('Repository')!r}, and this is {repository}.")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--tag", required=True)
    parser.add_argument("--repository", required=True)
    options = parser.parse_args()
    for fault in faults(options.wheel, options.tag, options.repository):
        print(fault, file=sys.stderr)
    sys.exit(1 if faults(options.wheel, options.tag, options.repository) else 0)
