"""Makes the checkpoints in `pyreft/` and what pyreft itself computes with them, by the real pyreft 0.1.0.

    python tests/data/conversion/make_pyreft.py

in an environment with pyreft==0.1.0, pyvene==0.1.8 and transformers==4.45.1. Each case is trained for some steps, so
that no parametrization is where it started, saved by pyreft, loaded by pyreft, and run: `expected.safetensors` holds,
by the name of the case, every fourth logit at the last three tokens of two prompts (padded on the right), or all of a
classifier, in float64, and the tokens that greedy decoding gives for each in float32. `cases.json` says how each case
was made.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyreft
import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)


HERE = Path(__file__).parent
OUT = HERE / "pyreft"
LLAMA = HERE.parent / "pyreft" / "base"
LENGTHS = (11, 8)
EDITS = ("Loreft", "Noreft", "Direft", "Nodireft", "Consreft", "Lobireft")


def make_bases() -> None:
    """Small bases of other architectures than that of tests/data/pyreft/base."""
    torch.manual_seed(1)
    gpt2 = GPT2Config(
        vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(gpt2).save_pretrained(OUT / "base-gpt2")
    roberta = RobertaConfig(
        vocab_size=61, max_position_embeddings=34, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, initializer_range=0.3, num_labels=3, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    RobertaForSequenceClassification(roberta).save_pretrained(OUT / "base-roberta")


def blocks(layers, tied):
    """The places of an adapter as pyreft's own training script lists them: all layers, and again for the last
    tokens."""
    return [{"layer": layer, "component": "block_output"} for layer in (layers if tied else layers * 2)]


def base_of(name):
    if name == "llama":
        return LlamaForCausalLM.from_pretrained(LLAMA)
    if name == "llama-classifier":
        torch.manual_seed(2)
        return LlamaForSequenceClassification.from_pretrained(LLAMA, num_labels=3)
    if name == "gpt2":
        return GPT2LMHeadModel.from_pretrained(OUT / "base-gpt2", attn_implementation="eager")
    return RobertaForSequenceClassification.from_pretrained(OUT / "base-roberta", attn_implementation="eager")


def build(case):
    """A pyreft model, with a seed of its own."""
    model = base_of(case["base"])
    torch.manual_seed(sum(map(ord, case["name"])))
    kind = getattr(pyreft, f"{case['intervention']}Intervention")
    representations = [
        {
            "low_rank_dimension": place.get("r", 3),
            "intervention": kind(
                embed_dim=place.get("width", model.config.hidden_size),
                low_rank_dimension=place.get("r", 3),
                dtype=torch.float32,
                act_fn=case["act_fn"],
                add_bias=case["add_bias"],
            ),
            **{key: place[key] for key in ("layer", "component") if key in place},
        }
        for place in case["places"]
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
    for name in case["head"]:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad = True
    return reft


def batch_of(case):
    """Two prompts, padded on the right, and pyreft's lists of positions for them [places, rows, positions]."""
    generator = torch.Generator().manual_seed(7)
    roberta = case["base"] == "roberta"
    ids = torch.randint(3, 61, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, length:], mask[row, length:] = int(roberta), 0
    lists = [
        pyreft.get_intervention_locations(
            last_position=length,
            positions=case["positions"],
            num_interventions=len(case["places"]),
            share_weights=case["share_weights"],
        )
        for length in LENGTHS
    ]
    return ids, mask, torch.tensor(lists).permute(1, 0, 2).tolist()


def train(reft, case) -> None:
    """Some steps, for R to leave its start. The labels are noise."""
    ids, mask, places = batch_of(case)
    torch.manual_seed(3)
    labels = torch.randint(0, 3, (2,)) if case["head"] else torch.randint(3, 61, ids.shape)
    parameters = [parameter for _, parameter in reft.named_parameters() if parameter.requires_grad]
    # Weight decay would make R 0: torch reads signs off the diagonal of what it decays, as whole numbers.
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(6):
        _, output = reft(
            {"input_ids": ids, "attention_mask": mask}, unit_locations={"sources->base": (None, places)}, labels=labels
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    reft.eval()


def at_last_tokens(logits):
    """Every fourth of the last three tokens of each prompt [rows, 3, vocabulary / 4]; of a classifier, all."""
    return logits if logits.dim() == 2 else torch.stack([logits[row, n - 3 : n, ::4] for row, n in enumerate(LENGTHS)])


def load(case, folder):
    """A fresh model with the weights in a folder, as pyreft's `load_intervention` puts them there, which wants a GPU
    for it."""
    reft = build(case)
    for key, intervention in reft.interventions.items():
        intervention.load_state_dict(torch.load(Path(folder) / f"intkey_{key}.bin", weights_only=True))
    if (Path(folder) / "pytorch_model.bin").exists():
        reft.model.load_state_dict(torch.load(Path(folder) / "pytorch_model.bin", weights_only=True), strict=False)
    reft.eval()
    return reft


def cast(reft, dtype) -> None:
    for part in (reft.model, *reft.interventions.values()):
        part.to(dtype)


def run(reft, case) -> dict[str, torch.Tensor]:
    """What pyreft computes: logits of the batch and, of a language model, greedy tokens of each row."""
    ids, mask, places = batch_of(case)
    results = {}
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask}
        cast(reft, torch.float64)
        _, output = reft(inputs, unit_locations={"sources->base": (None, places)})
        base, _ = reft(inputs, unit_locations={"sources->base": (None, places)}, output_original_output=True)
        results["logits"] = at_last_tokens(output.logits)
        results["moved"] = (results["logits"] - at_last_tokens(base.logits)).abs().max()[None]
        cast(reft, torch.float32)
        for row, length in enumerate(LENGTHS if not case["head"] else ()):
            inputs = {"input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
            _, tokens = reft.generate(
                inputs,
                unit_locations={"sources->base": (None, [[place[row]] for place in places])},
                intervene_on_prompt=True,
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
            )
            results[f"tokens{row}"] = tokens
    return results


def cases():
    def case(name, intervention, places, positions="f3+l3", **more):
        defaults = {
            "base": "llama", "share_weights": False, "act_fn": None, "add_bias": False, "head": [], "saved_by": "save",
        }  # fmt: skip
        return {
            "name": name,
            "intervention": intervention,
            "places": places,
            "positions": positions,
            **defaults,
            **more,
        }

    for edit in EDITS:
        for tied in (True, False):
            kind = "tied" if tied else "untied"
            layers = [0, 2] if edit == "Loreft" else [1]
            yield case(f"{edit.lower()}.{kind}", edit, blocks(layers, tied), share_weights=tied)
    for edit in ("Noreft", "Nodireft"):
        yield case(f"{edit.lower()}.bias", edit, blocks([1], True), positions="f3", add_bias=True)
    yield case("loreft.gelu", "Loreft", blocks([1], False), act_fn="gelu")
    yield case("loreft.last", "Loreft", blocks([1], True), positions="l2")
    for edit in EDITS:
        tied = edit != "Loreft"
        yield case(
            f"{edit.lower()}.trainer", edit, blocks([1], tied), share_weights=tied, saved_by="save_intervention"
        )
    inner = [
        {"layer": 0, "component": "mlp_output", "r": 2},
        {"layer": 1, "component": "attention_output", "r": 3},
        {"layer": 2, "component": "block_output", "r": 4},
        {"layer": 0, "component": "key_output", "r": 2, "width": 16},
    ]
    yield case("components", "Loreft", inner * 2)
    paths = [
        {"component": f"model.layers[{layer}].{rest}"} for layer, rest in ((0, "mlp.down_proj.output"), (2, "output"))
    ]
    yield case("paths", "Loreft", paths, positions="f2+l2", share_weights=True)
    yield case("paths.trainer", "Loreft", paths, positions="f2+l2", share_weights=True, saved_by="save_intervention")
    yield case("gpt2", "Loreft", blocks([0, 1], False), base="gpt2")
    head = {"base": "llama-classifier", "head": ["score"]}
    yield case("head", "Loreft", blocks([1], True), positions="l1", **head)
    roberta = [{"component": f"roberta.encoder.layer[{layer}].output"} for layer in (0, 1)]
    yield case("head.roberta", "Nodireft", roberta, positions="f1", base="roberta", head=["classifier"])


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    make_bases()
    expected, listed = {}, []
    for case in cases():
        reft = build(case)
        train(reft, case)
        getattr(reft, case["saved_by"])(str(OUT / case["name"]), include_model=True)
        for key, value in run(load(case, OUT / case["name"]), case).items():
            expected[f"{case['name']}.{key}"] = value.contiguous()
        listed.append(case)
        moved = float(expected.pop(f"{case['name']}.moved"))
        assert moved > 0.1, (case["name"], moved)
    ids, mask, _ = batch_of(case | {"base": "llama"})
    expected |= {"input_ids": ids, "attention_mask": mask}
    save_file(expected, OUT / "expected.safetensors")
    (OUT / "cases.json").write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    main()
