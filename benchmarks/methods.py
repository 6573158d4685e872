"""The models to measure, and the methods that are put on them.

This file also runs in the environments of pyreft and adapters. So only torch and transformers are imported at its
head, and only what their versions in these environments have in common is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers


VOCABULARY = 256
SIZES: dict[str, dict[str, int]] = {
    # Small and deep: dispatching operations then takes a large part of the time on a CPU, as it does on a GPU.
    "deep": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 32, "num_attention_heads": 4},
    # The sizes of SmolLM2-135M.
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    # About one billion weights.
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@dataclass
class Setting:
    """A model, a batch and an adapter to measure.

    Args:
        size (`str`): A key of `SIZES`.
        base_layers (`int`, *optional*): Number of layers of the base. None: that of its size.
        batch, length, prompt (`int`): Rows of a batch, tokens of a row, and how many of these are prompt.
        rank (`int`): The rank of ReFT and of LoRA.
        positions (`str`): ReFT's positions.
        tied (`bool`): Whether first and last tokens share weights.
        layers (`list[int]`, *optional*): The layers that ReFT edits. None: all.
        device (`str`): `"cpu"` or `"cuda"`.
        dtype (`str`): The dtype of the base.
        attention (`str`): transformers' `attn_implementation`.
        checkpointing (`bool`): Whether to use gradient checkpointing.
        packed (`bool`): Whether all sequences are in one row, with position ids that restart.
        four_bit (`bool`): Whether bitsandbytes quantizes the base.
    """

    size: str = "deep"
    base_layers: int | None = None
    batch: int = 8
    length: int = 128
    prompt: int = 96
    rank: int = 8
    positions: str = "f7+l7"
    tied: bool = True
    layers: list[int] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    attention: str = "sdpa"
    checkpointing: bool = False
    packed: bool = False
    four_bit: bool = False

    @property
    def first_and_last(self) -> tuple[int, int]:
        """The numbers of first and of last tokens in `positions`."""
        counts = {part[0]: int(part[1:]) for part in self.positions.split("+")}
        return counts.get("f", 0), counts.get("l", 0)


def base_model(setting: Setting) -> Any:
    """A Llama with random weights, the same for every method."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"vocab_size": VOCABULARY, **SIZES[setting.size]}
    settings |= {"max_position_embeddings": 4096, "attn_implementation": setting.attention, "use_cache": False}
    if setting.base_layers is not None:
        settings["num_hidden_layers"] = setting.base_layers
    config = transformers.LlamaConfig(**settings)
    if setting.four_bit:
        return _four_bit(config, setting)
    with torch.device(setting.device):
        model = transformers.LlamaForCausalLM(config)
    return model.to(getattr(torch, setting.dtype))


def _four_bit(config: Any, setting: Setting) -> Any:
    import tempfile

    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, setting.dtype)
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(config).to(getattr(torch, setting.dtype)).save_pretrained(folder)
        return transformers.LlamaForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map={"": setting.device}
        )


def training_batch(setting: Setting) -> dict[str, torch.Tensor]:
    """A batch of random tokens, with labels after the prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (setting.batch, setting.length), generator=generator)
    labels = ids.clone()
    labels[:, : setting.prompt] = -100
    batch = {"input_ids": ids, "labels": labels}
    if setting.packed:
        positions = torch.arange(setting.length).repeat(setting.batch)
        batch = {name: tensor.view(1, -1) for name, tensor in batch.items()}
        batch["position_ids"] = positions.view(1, -1)
    else:
        batch["attention_mask"] = torch.ones_like(ids)
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}


@dataclass
class Subject:
    """A model with a method on it.

    Args:
        model: The model, or an object with its methods.
        call: Called with the model and a batch, runs a forward and returns the loss.
    """

    model: Any
    call: Any

    def trainable(self) -> int:
        """The number of trained weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def frozen(setting: Setting) -> Subject:
    """The base, nothing trained. Its input requires a gradient, so that a step includes a whole backward."""
    model = base_model(setting).requires_grad_(False)
    model.enable_input_require_grads()
    return Subject(_checkpointed(model, setting), lambda model, batch: model(**batch).loss)


class _Sketch(torch.nn.Module):
    """Only LoReFT's arithmetic around a block: the tokens are known, R is not kept orthonormal, nothing is checked."""

    def __init__(self, block: torch.nn.Module, setting: Setting, width: int) -> None:
        super().__init__()
        self.block = block
        self.R_RD = torch.nn.Parameter(torch.empty(setting.rank, width).normal_(std=width**-0.5))
        self.source_DR = torch.nn.Parameter(torch.zeros(width, setting.rank))
        self.bias_R = torch.nn.Parameter(torch.zeros(setting.rank))
        first, last = setting.first_and_last
        columns = torch.tensor([*range(first), *range(setting.prompt - last, setting.prompt)])
        self.row_T = torch.arange(setting.batch).repeat_interleave(len(columns))
        self.column_T = columns.repeat(setting.batch)
        self.index_T = {tokens: self.row_T * tokens + self.column_T for tokens in (setting.length, setting.prompt)}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        h = self.block(*args, **kwargs)
        index_T = self.index_T.get(h.shape[1])
        if index_T is None:  # a decode step
            return h
        h_TD = h.view(-1, h.shape[2]).index_select(0, index_T)
        delta_TD = h_TD.mm(self.source_DR).add_(self.bias_R).mm(self.R_RD)
        return h.index_put_((self.row_T, self.column_T), delta_TD, accumulate=True)


def sketch(setting: Setting) -> Subject:
    """The edit alone, in plain torch operations: no method that runs layer by layer in eager mode can be faster."""
    model = base_model(setting).requires_grad_(False)
    model.enable_input_require_grads()
    for index in range(len(model.model.layers)):
        model.model.layers[index] = _Sketch(model.model.layers[index], setting, model.config.hidden_size)
    return Subject(model.to(setting.device), lambda model, batch: model(**batch).loss)


def reft(setting: Setting) -> Subject:
    """LoReFT of this package."""
    from peft import get_peft_model

    import peft_reft

    config = peft_reft.ReftConfig(
        r=setting.rank,
        positions=setting.positions,
        share_weights=setting.tied,
        layers_to_transform=setting.layers,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(_checkpointed(base_model(setting), setting), config)
    return Subject(model, lambda model, batch: model(**batch).loss)


def lora(setting: Setting) -> Subject:
    """PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=setting.rank, target_modules=LORA_TARGETS, layers_to_transform=setting.layers, task_type="CAUSAL_LM"
    )
    model = get_peft_model(_checkpointed(base_model(setting), setting), config)
    return Subject(model, lambda model, batch: model(**batch).loss)


def pyreft(setting: Setting) -> Subject:
    """LoReFT of pyreft. Its lists of positions are made by hand."""
    import pyreft as library

    base = base_model(setting)
    width, count = base.config.hidden_size, base.config.num_hidden_layers
    layers = list(range(count)) if setting.layers is None else setting.layers
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": setting.rank,
            "intervention": library.LoreftIntervention(
                embed_dim=width, low_rank_dimension=setting.rank, dtype=getattr(torch, setting.dtype)
            ),
        }
        for layer in layers
    ]
    model = library.get_reft_model(base, library.ReftConfig(representations=representations), set_device=False)
    model.set_device(setting.device)
    first, last = setting.first_and_last
    columns = [*range(first), *range(setting.prompt - last, setting.prompt)]
    locations = [[columns] * setting.batch for _ in layers]

    def call(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        _, output = model(inputs, unit_locations={"sources->base": (None, locations)}, labels=batch["labels"])
        return output.loss

    return _Pyreft(model, call)


class _Pyreft(Subject):
    """A model of pyreft: its `parameters()` lack those of the interventions, which are not its submodules."""

    def parameters(self) -> list[torch.nn.Parameter]:
        interventions = self.model.interventions.values()
        modules = [i[0] if isinstance(i, (list, tuple)) else i for i in interventions]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def adapters(setting: Setting) -> Subject:
    """LoReFT of the adapters library."""
    import adapters as library

    first, last = setting.first_and_last
    model = base_model(setting)
    library.init(model)
    config = library.LoReftConfig(
        layers="all" if setting.layers is None else setting.layers,
        prefix_positions=first,
        suffix_positions=last,
        r=setting.rank,
        tied_weights=setting.tied,
    )
    model.add_adapter("reft", config=config)
    model.train_adapter("reft")
    model.set_active_adapters("reft")
    model.to(setting.device)
    return Subject(model, lambda model, batch: model(**batch).loss)


METHODS = {"frozen": frozen, "sketch": sketch, "reft": reft, "lora": lora, "pyreft": pyreft, "adapters": adapters}


def _checkpointed(model: Any, setting: Setting) -> Any:
    if setting.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
