"""Tiny quantized Llamas, one for each library and kind that runs on a CPU, made on the spot.

transformers loads them wherever it can. Checkpoints that come quantized are written here, by rounding to nearest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as t
from models import BOS, EOS, PAD, VOCAB
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor, nn


GROUP = 64  # of weights that share a scale
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
Load = Callable[[Path], nn.Module]


def plain() -> nn.Module:
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.1)
    return model.eval()


def by_config(package: str, make: Callable[[], object]) -> Load:
    """A loader: transformers quantizes an ordinary checkpoint while it loads it."""

    def load(folder: Path) -> nn.Module:
        pytest.importorskip(package)
        if not folder.exists():
            plain().save_pretrained(folder)
        return t.AutoModelForCausalLM.from_pretrained(folder, quantization_config=make(), dtype=torch.float32)

    return load


def torchao(kind: str, **settings: object) -> Load:
    def make() -> object:
        import torchao.quantization as ao

        if "granularity" in settings:
            settings["granularity"] = ao.PerGroup(GROUP)
        return t.TorchAoConfig(getattr(ao, kind)(**settings))

    return by_config("torchao", make)


def quanto(weights: str) -> Load:
    """Used with 8 bits only: for fewer, quanto first compiles a C++ extension, which takes half a minute."""
    return by_config("optimum.quanto", lambda: t.QuantoConfig(weights=weights))


def hqq(bits: int) -> Load:
    """The layers are replaced by hand, as hqq's own loader does: transformers 5.23 refuses HQQ."""

    def load(folder: Path) -> nn.Module:
        core = pytest.importorskip("hqq.core.quantize")
        model = plain()
        settings = core.BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        for name, linear in projections(model).items():
            model.set_submodule(name, core.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu"))
        return model

    return load


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def checkpoint(
    quantize: Callable[[Tensor], dict[str, Tensor]], package: str = "torch", **quantization: object
) -> Load:
    """A loader of a quantized checkpoint. `quantize` returns, by name, the tensors that the file has for a weight."""
    backend = quantization.pop("backend", None)

    def load(folder: Path) -> nn.Module:
        pytest.importorskip(package)
        if not folder.exists():
            model = plain()
            model.config.save_pretrained(folder)
            tensors = {}
            for name, tensor in model.state_dict().items():
                owner, _, last = name.rpartition(".")
                new = quantize(tensor) if owner.endswith("_proj") else {last: tensor}
                tensors |= {f"{owner}.{part}": value.contiguous() for part, value in new.items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            file = folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
        chosen = {} if backend is None else {"quantization_config": t.GPTQConfig(bits=4, backend=backend)}
        return t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **chosen)

    return load


def grouped_integers(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The weight as numbers from 0 to 2**bits - 1, the middle of which is 0, and scales of groups [out, in /
    GROUP]."""
    groups = weight.unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    numbers = (groups / scales).round() + 2 ** (bits - 1)
    return numbers.flatten(1).long(), scales[..., 0]


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Pack 32 / bits numbers of a row into an int32, the first into its lowest bits."""
    shifts = torch.arange(32 // bits) * bits
    words = (numbers.unflatten(1, (-1, 32 // bits)) << shifts).sum(dim=-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def compressed(bits: int) -> Load:
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        numbers, scales = grouped_integers(weight, bits)
        return {
            "weight_packed": packed(numbers, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }

    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    return checkpoint(
        quantize,
        "compressed_tensors",
        quant_method="compressed-tensors",
        format="pack-quantized",
        quantization_status="compressed",
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
    )


def compressed_fp8() -> Load:
    """A scale for each output of a weight, and one for each token of the activations."""

    def quantize(weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}

    kind = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**kind, "strategy": "channel"}
    inputs = {**kind, "strategy": "token", "dynamic": True}
    return checkpoint(
        quantize,
        "compressed_tensors",
        quant_method="compressed-tensors",
        format="float-quantized",
        quantization_status="compressed",
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        ignore=["lm_head"],
    )


def fp8() -> Load:
    """A scale for each block of the weight, as DeepSeek has it. transformers unpacks it where there is no GPU."""

    def quantize(weight: Tensor) -> dict[str, Tensor]:
        blocks = weight.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP))
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        rounded = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        return {"weight": rounded.flatten(2).flatten(0, 1), "weight_scale_inv": scales}

    unpack = checkpoint(
        quantize,
        quant_method="fp8",
        activation_scheme="dynamic",
        weight_block_size=[GROUP, GROUP],
        modules_to_not_convert=["lm_head"],
    )

    def load(folder: Path) -> nn.Module:
        if Version(t.__version__) < Version("5.23"):
            pytest.skip(
                "transformers 5.16 fails to load it without a GPU: update_tp_plan in quantizer_finegrained_fp8.py"
            )
        return unpack(folder)

    return load


def gptq() -> Load:
    """With the backend "torch": the one that gptqmodel chooses for a CPU gives no gradient."""

    def quantize(weight: Tensor) -> dict[str, Tensor]:
        pytest.importorskip("optimum")
        numbers, scales = grouped_integers(weight, 4)
        zeros = torch.full_like(scales, 2**3 - 1, dtype=torch.long)  # the format stores them less 1
        return {
            "qweight": packed(numbers, 4).T,
            "qzeros": packed(zeros.T, 4),
            "scales": scales.T.half(),
            "g_idx": torch.arange(weight.shape[1]).int() // GROUP,
        }

    return checkpoint(
        quantize,
        "gptqmodel",
        backend="torch",
        quant_method="gptq",
        bits=4,
        group_size=GROUP,
        sym=True,
        desc_act=False,
        checkpoint_format="gptq",
    )


# Name -> loader, and the class of a quantized layer, or of its weight where the layer is an ordinary one.
BASES: dict[str, tuple[Load, str]] = {
    "torchao int8": (torchao("Int8WeightOnlyConfig"), "TorchAOBaseTensor"),
    "torchao int4": (
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity="groups"),
        "TorchAOBaseTensor",
    ),
    "torchao float8": (torchao("Float8WeightOnlyConfig"), "TorchAOBaseTensor"),
    "quanto int8": (quanto("int8"), "QLinear"),
    "quanto float8": (quanto("float8"), "QLinear"),
    "hqq 8 bit": (hqq(8), "HQQLinear"),
    "hqq 4 bit": (hqq(4), "HQQLinear"),
    "compressed-tensors int8": (compressed(8), "unpacked at the first forward"),
    "compressed-tensors int4": (compressed(4), "unpacked at the first forward"),
    "compressed-tensors fp8": (compressed_fp8(), "unpacked at the first forward"),
    "fp8": (fp8(), "unpacked while loading"),
    "gptq": (gptq(), "TorchLinear"),
}
