"""What a ReFT adapter gets, and is refused, when axolotl validates a YAML.

axolotl's validation grants some options to the names lora and qlora alone. `validated_as_lora` has it read the YAML of
a ReFT adapter under that name, as `axolotl_api.build_base_as_for_lora` does for loading. What LoRA alone can use, and
what can't work with ReFT, is refused here, before anything is loaded. This module knows no field of ReftConfig but
`positions` and `response_template`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from peft_reft import ReftConfig
from peft_reft.tuner.chat_template import AUTO
from peft_reft.tuner.interventions.formulas import INTERVENTIONS

from . import axolotl_api
from .template import WAYS_OUT, has_chats_alone


# Values of `rl:` whose trainers pass the model keys that a collator adds to a batch, `prompt_lengths` among them.
# Other trainers pass ids and masks only.
TOLD_BY_COLLATOR = ("dpo", "ipo", "kto")
# axolotl turns these kernels on by itself under the name lora, unless one of them is set.
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# The paper's rate for LoReFT is about 1e-3. LoRA's usual 2e-4 is slow. 4e-3 was seen to fail where all layers are
# edited, and to learn best where six of thirty are (docs/choosing.md).
LOW_RATE, HIGH_RATE = 2e-4, 2e-3


def is_reft(adapter: Any) -> bool:
    """Whether an `adapter:` of a YAML is a ReFT adapter."""
    return adapter in INTERVENTIONS


def own_name(adapter: Any) -> Any:
    """The adapter that an `adapter:` stands for: `reft` is loreft.

    Raises:
        ValueError: for other names that only a ReFT adapter can have been meant by, with the right ones.
    """
    if adapter == "reft":
        return "loreft"
    if isinstance(adapter, str) and "reft" in adapter.lower() and not is_reft(adapter):
        near = get_close_matches(adapter.lower(), INTERVENTIONS, n=1)
        raise ValueError(
            f"adapter: {adapter} is not a ReFT adapter. They are {', '.join(INTERVENTIONS)}, and reft, which is "
            f"loreft. {f'Did you mean adapter: {near[0]}?' if near else ''}".rstrip()
        )
    return adapter


def validated_as_lora(data: dict[str, Any], validate: Callable[[Any], Any]) -> Any:
    """Validate the YAML of a ReFT adapter by axolotl's rules for LoRA, and set its own name again."""
    adapter = data["adapter"]
    refuse_what_cannot_work(data)
    quantized = "qlora" if data.get("load_in_4bit") else "lora"
    model = validate(data | {"adapter": quantized} | dict.fromkeys(LORA_KERNELS, False))
    model.adapter = adapter
    for kernel in LORA_KERNELS:
        setattr(model, kernel, None)
    return model


def refuse_what_cannot_work(data: Mapping[str, Any]) -> None:
    """Refuse what no ReFT adapter can be trained with, whatever it edits.

    Raises:
        ValueError: naming the YAML's key, the reason and the way out.
    """
    adapter = data["adapter"]
    if data.get("load_in_4bit"):
        _check_base_can_be_loaded(data)
    if _shards_by_fsdp1(data):
        raise ValueError(
            "FSDP1 (fsdp:, or fsdp_config: with fsdp_version: 1, axolotl 0.19's default) flattens the parameters of "
            f"a block into one vector, and adapter: {adapter} needs each R as a matrix. Set fsdp_version: 2 and "
            "describe the sharding in fsdp_config: alone, without fsdp:."
        )
    context = data.get("context_parallel") or {}
    size = data.get("context_parallel_size") or data.get("sequence_parallel_degree") or _item(context, "size") or 1
    if size > 1:
        raise ValueError(
            f"context_parallel_size: {size} splits a sequence over GPUs, and no GPU then sees where the prompt begins "
            f"and ends, which adapter: {adapter} goes by. Set context_parallel_size: 1; fsdp_config: with "
            "fsdp_version: 2, or deepspeed:, save memory instead."
        )
    if data.get("relora"):
        raise ValueError(
            f"relora: true merges LoRA's matrices into the base and starts them again, which adapter: {adapter} has "
            "no counterpart for. Remove relora: and jagged_restart_steps:."
        )
    if str(data.get("optimizer")).startswith("muon"):
        raise ValueError(
            f"optimizer: {data['optimizer']} steps matrices, and the weights of adapter: {adapter} have three "
            "dimensions. Set optimizer: adamw_torch_fused, or adamw_8bit."
        )
    if data.get("optimizer") == "polora":
        raise ValueError(
            f"optimizer: polora updates LoRA's A and B only, which adapter: {adapter} does not have. Set optimizer: "
            "adamw_torch."
        )


def refuse_unknown_prompts(cfg: Any, config: ReftConfig) -> None:
    """Refuse settings of axolotl with which nothing says where prompts end, before anything is loaded. Where chat
    templates may say it, they are looked at when the datasets are loaded (template.py)."""
    if config.spec.all_tokens or config.response_template not in (None, AUTO):
        return
    if getattr(cfg, "train_on_inputs", None) and not has_chats_alone(cfg):
        raise ValueError(
            "train_on_inputs: true leaves no label masked, so labels do not say where prompts end, and ReFT edits "
            f"tokens of the prompt. Set train_on_inputs: false. {WAYS_OUT}"
        )
    kinds = [_item(dataset, "type") for dataset in getattr(cfg, "datasets", None) or []]
    kinds += ["pretraining_dataset"] if getattr(cfg, "pretraining_dataset", None) else []
    for kind in kinds if getattr(cfg, "rl", None) is None else []:
        if kind in ("completion", "pretrain", "pretraining_dataset"):
            key = "pretraining_dataset:" if kind == "pretraining_dataset" else f"type: {kind}"
            raise ValueError(
                f"{key} has texts without prompts, so there is nothing before an answer to edit. Set reft: positions: "
                f"all. If the texts hold prompts and answers, say where answers begin. {WAYS_OUT}"
            )


def refuse_rows_without_subspaces(cfg: Any) -> None:
    """Refuse settings of axolotl with which no row can name its subspaces.

    axolotl keeps the columns of rows that have tokens already. A prompt strategy returns tokens alone, a packed row is
    one row for several examples, and the trainers of preferences make rows of their own.

    Raises:
        ValueError: naming the YAML's key, the reason and the way out.
    """
    way_out = (
        "Make the tokens yourself: rows with input_ids, attention_mask, labels and subspaces (for example 'style', or "
        "'style+facts'), and a dataset without type:. Or remove reft: subspaces:."
    )
    for number, dataset in enumerate(getattr(cfg, "datasets", None) or ()):
        kind = _item(dataset, "type")
        if kind:
            kind = kind if isinstance(kind, str) else "a mapping"
            raise ValueError(
                f"reft: subspaces: is set, and datasets[{number}] has type: {kind}, which keeps no column of a row "
                f"but its tokens, so no row can name its subspaces. {way_out}"
            )
    for key in ("sample_packing", "rl", "pretraining_dataset"):
        value = getattr(cfg, key, None)
        if value:
            value = getattr(value, "value", value)
            raise ValueError(
                f"{key}: {value} makes rows of several texts, which keep no name of a subspace, and reft: subspaces: "
                f"is set. Remove {key}:, or reft: subspaces:."
            )


def about_learning_rate(cfg: Mapping[str, Any]) -> tuple[str, str] | None:
    """What there is to say of a YAML's learning rate: the level of the log ("info" or "warning") and the line."""
    try:
        rate = float(cfg.get("learning_rate"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None  # axolotl says what it thinks of it
    adapter = cfg.get("adapter")
    if rate <= LOW_RATE:
        return "info", (
            f"learning_rate: {rate:g} is usual for LoRA. adapter: {adapter} learns at it, slower than at its best of "
            "about 0.001."
        )
    if rate > HIGH_RATE and not cfg.get("peft_layers_to_transform"):
        return "warning", (
            f"learning_rate: {rate:g} is high for adapter: {adapter} in all layers: 0.004 was seen to fail there. "
            "Take about 0.001, or edit fewer layers (peft_layers_to_transform): docs/choosing.md."
        )
    return None


def about_weight_decay(cfg: Mapping[str, Any]) -> str | None:
    """A warning of a YAML's weight decay, where it does not lead an edit back to the base model. None: nothing to say.

    Decay shrinks W and b. An R that is kept orthonormal keeps its length, so of an edit that replaces Rh what is left
    in the end is −RᵀRh. Where the edit has no −Rh, or R shrinks too, decay leads to no edit, as LoRA's does.
    """
    try:
        decay = float(cfg.get("weight_decay") or 0.0)
    except (TypeError, ValueError):
        return None  # axolotl says what it thinks of it
    adapter = str(cfg.get("adapter"))
    edit = INTERVENTIONS[adapter]
    if decay <= 0 or not (edit.orthonormal and edit.replaces):
        return None
    return (
        f"weight_decay: {decay:g} does not draw adapter: {adapter} back to the base model, as it does LoRA: the "
        "source of the edit shrinks, R keeps its length, and what the edit takes from the hidden state stays taken. "
        "Set weight_decay: 0.0."
    )


def _item(thing: Any, name: str) -> Any:
    """A key of a mapping, or an attribute: axolotl's datasets are the one or the other."""
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)


def _shards_by_fsdp1(data: Mapping[str, Any]) -> bool:
    fsdp_config = data.get("fsdp_config") or {}
    if not (data.get("fsdp") or fsdp_config):
        return False
    given = data.get("fsdp_version"), _item(fsdp_config, "fsdp_version"), _item(fsdp_config, "version")
    version = next((str(value) for value in given if value is not None), None)
    if version is None:
        return bool(data.get("fsdp")) or axolotl_api.has_fsdp1()
    return version == "1"


def _check_base_can_be_loaded(data: Mapping[str, Any]) -> None:
    """Refuse ways of loading a 4-bit base that axolotl has for `adapter: qlora` only, and name one for ReFT."""
    if data.get("nf4_backend") == "torchao":
        raise ValueError(
            f"nf4_backend: torchao is for adapter: qlora alone, not for adapter: {data['adapter']}. Remove "
            "nf4_backend: bitsandbytes, the default, quantizes the base to 4 bits of the same kind (NF4)."
        )
    fsdp = data.get("fsdp_config") or {}
    if fsdp.get("cpu_ram_efficient_loading") or fsdp.get("fsdp_cpu_ram_efficient_loading"):
        raise ValueError(
            "fsdp_config: cpu_ram_efficient_loading: true with load_in_4bit: true is for adapter: qlora alone (from "
            f"axolotl 0.21 on; before, for none), not for adapter: {data['adapter']}, and "
            "qlora_sharded_model_loading: true does not change that. Set fsdp_config: cpu_ram_efficient_loading: "
            "false: every process then loads and quantizes the base by itself. Or keep it, and remove load_in_4bit."
        )
