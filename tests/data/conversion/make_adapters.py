"""Makes the checkpoints in `adapters/` and what the adapters library computes with them, by the real adapters 1.3.0.

    python tests/data/conversion/make_adapters.py

in an environment with adapters==1.3.0 (and transformers==4.57.6), after make_pyreft.py, whose bases and prompts it
uses. Each case is trained for some steps, saved by `save_adapter`, and run: `expected.safetensors` and `cases.json`
are as make_pyreft.py says. Greedy tokens there are only of adapters that edit first tokens alone, and come from full
passes without a cache: with one, adapters edits whatever it is fed as if it were a prompt, and with last tokens it
edits other tokens at each step.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, RobertaForSequenceClassification


HERE = Path(__file__).parent
OUT = HERE / "adapters"
# The library notes the name of the base model, which should be the same wherever this runs: relative to this folder.
BASES = {
    "llama": (LlamaForCausalLM, "../pyreft/base"),
    "roberta": (RobertaForSequenceClassification, "pyreft/base-roberta"),
    "roberta-flex": (adapters.RobertaAdapterModel, "pyreft/base-roberta"),
}
LENGTHS = (11, 8)


def cases():
    def case(name, kind, base="llama", with_head=False, use_safetensors=False, **settings):
        settings = {"r": 3, "prefix_positions": 3, "suffix_positions": 3, **settings}
        return {
            "name": name, "kind": kind, "base": base, "with_head": with_head, "use_safetensors": use_safetensors,
            "settings": settings,
        }  # fmt: skip

    yield case("loreft.first", "LoReftConfig", suffix_positions=0, layers=[1], with_head=True)
    yield case("loreft.last", "LoReftConfig", prefix_positions=0, layers=[1])
    yield case("loreft.untied", "LoReftConfig", layers=[1], use_safetensors=True)
    yield case("loreft.tied", "LoReftConfig", tied_weights=True, non_linearity="gelu")  # of all layers
    yield case("noreft.untied", "NoReftConfig", layers=[1])
    yield case("direft.untied", "DiReftConfig", layers=[1])
    yield case("noreft.first", "NoReftConfig", suffix_positions=0, layers=[1])
    yield case("direft.first", "DiReftConfig", suffix_positions=0, layers=[1])
    yield case("head.roberta", "LoReftConfig", base="roberta", with_head=True, suffix_positions=0)
    yield case("head.flex", "LoReftConfig", base="roberta-flex", with_head=True, suffix_positions=0, layers=[1])


def batch_of(case):
    known = load_file(HERE / "pyreft" / "expected.safetensors")
    ids, mask = known["input_ids"].clone(), known["attention_mask"]
    if case["base"] != "llama":
        ids[mask == 0] = 1
    return ids, mask


def main() -> None:
    os.chdir(HERE)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    expected = {}
    for case in cases():
        kind, base = BASES[case["base"]]
        torch.manual_seed(5)
        model = kind.from_pretrained(base)
        if case["base"] != "roberta-flex":
            adapters.init(model)
        else:
            model.add_classification_head("task", num_labels=3)
        ids, mask = batch_of(case)
        with torch.no_grad():
            before = model(input_ids=ids, attention_mask=mask).logits
        model.add_adapter("task", config=getattr(adapters, case["kind"])(**case["settings"]))
        model.train_adapter("task")
        labels = torch.randint(0, 3, (2,)) if case["base"] != "llama" else torch.randint(3, 61, ids.shape)
        trained = [p for n, p in model.named_parameters() if p.requires_grad and (".refts." in n or case["with_head"])]
        optimizer = torch.optim.Adam(trained, lr=0.03)
        for _ in range(6):
            optimizer.zero_grad()
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
        model.eval()
        folder = str(OUT / case["name"])
        model.save_adapter(folder, "task", with_head=case["with_head"], use_safetensors=case["use_safetensors"])
        with torch.no_grad():
            torch.set_default_dtype(
                torch.float64
            )  # in which the library makes the states of positions that there are none of
            logits = model.double()(input_ids=ids, attention_mask=mask).logits
            torch.set_default_dtype(torch.float32)
            model.float()
            assert (logits - before)[mask.bool() if logits.dim() == 3 else ...].abs().max() > 0.1
            if logits.dim() == 3:
                logits = torch.stack([logits[row, n - 3 : n, ::4] for row, n in enumerate(LENGTHS)])
            expected[f"{case['name']}.logits"] = logits.contiguous()
            if case["base"] == "llama" and case["settings"]["suffix_positions"] == 0:
                for row, n in enumerate(LENGTHS):
                    expected[f"{case['name']}.tokens{row}"] = model.generate(
                        input_ids=ids[row : row + 1, :n], attention_mask=mask[row : row + 1, :n], max_new_tokens=8,
                        min_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0,
                    )  # fmt: skip
    save_file(expected, OUT / "expected.safetensors")
    (OUT / "cases.json").write_text(json.dumps(list(cases()), indent=1) + "\n")


if __name__ == "__main__":
    main()
