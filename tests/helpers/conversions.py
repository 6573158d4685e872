"""The checkpoints in tests/data/conversion: converts them, and runs a model with the result."""

from __future__ import annotations

import json
from pathlib import Path

import paths
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_reft import ReftLayer
from peft_reft.conversion import Conversion, convert_adapters, convert_pyreft


DATA = paths.DATA / "conversion"
BASES = {
    "llama": DATA.parent / "pyreft" / "base",
    "llama-classifier": DATA.parent / "pyreft" / "base",
    "gpt2": DATA / "pyreft" / "base-gpt2",
    "roberta": DATA / "pyreft" / "base-roberta",
    "roberta-flex": DATA / "pyreft" / "base-roberta",
}
LENGTHS = (11, 8)


def cases_of(library: str) -> dict[str, dict]:
    return {case["name"]: case for case in json.loads((DATA / library / "cases.json").read_text())}


PYREFT, ADAPTERS = cases_of("pyreft"), cases_of("adapters")


def expected(library: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / library / "expected.safetensors")


def from_pyreft(case: dict, out: Path, **changes) -> Conversion:
    """Convert a case, given only the settings that its files lack."""
    given = {
        "folder": DATA / "pyreft" / case["name"],
        "out": out,
        "base_model": str(BASES[case["base"]]),
        "positions": case["positions"],
        "act_fn": case["act_fn"],
    }
    if case["saved_by"] == "save_intervention" and case["intervention"] not in ("Loreft", "Direft"):
        given["intervention"] = case["intervention"].lower()
    if case["base"] == "llama-classifier":
        given["task_type"] = "SEQ_CLS"
    return convert_pyreft(**{**given, **changes})


def from_adapters(case: dict, out: Path, **changes) -> Conversion:
    edit = {"NoReftConfig": "noreft", "DiReftConfig": "nodireft"}.get(case["kind"])
    given = {"base_model": str(BASES[case["base"]]), "intervention": edit}
    return convert_adapters(DATA / "adapters" / case["name"], out, **{**given, **changes})


def base_of(name: str) -> torch.nn.Module:
    if name in ("llama", "gpt2"):
        return AutoModelForCausalLM.from_pretrained(BASES[name])
    return AutoModelForSequenceClassification.from_pretrained(BASES[name], num_labels=3)


def adapted(base: str, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base_of(base), folder).eval()


def prompts(base: str) -> dict[str, torch.Tensor]:
    known = load_file(DATA / "pyreft" / "expected.safetensors")
    ids, mask = known["input_ids"], known["attention_mask"]
    return {"input_ids": ids.masked_fill(mask == 0, int(base.startswith("roberta"))), "attention_mask": mask}


def logits_of(model: torch.nn.Module, base: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A model's logits at the tokens for which expected.safetensors has them, computed in float64."""
    model.to(dtype)
    for layer in model.modules():
        if isinstance(layer, ReftLayer):
            # Use R as the file has it: a forward in float64 would make R orthonormal to more digits.
            layer.bases.mark_clean("default")
    with torch.no_grad():
        logits = model(**prompts(base)).logits
    model.float()
    if logits.dim() == 2:
        return logits
    return torch.stack([logits[row, length - 3 : length, ::4] for row, length in enumerate(LENGTHS)])


def tokens_of(model: torch.nn.Module, base: str, row: int) -> list:
    inputs = {key: value[row : row + 1, : LENGTHS[row]] for key, value in prompts(base).items()}
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
