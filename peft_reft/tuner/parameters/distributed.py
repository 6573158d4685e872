"""Bases whose values an engine keeps: FSDP2 as shards, DeepSpeed's ZeRO as partitions of a copy in float32.

This module knows how a parameter of such an engine is recognised, assembled and written back. How a basis is made orthonormal
is orthogonal.py's.

What a forward reads of such a parameter is a copy that the engine fills anew each time, so that a retraction of it would be lost.
And who saves may be one process alone, or an engine that does not ask the module. So a kept basis is retracted at the end of the
optimizer's step, in which all processes take part: forwards, saves and loads find it orthonormal, in the engine's own copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..engines_api import is_in_zero, splits_sequences
from ..interventions import orthogonal


def is_distributed() -> bool:
    """Whether this process is set up as one of several, so that an engine may keep its parameters."""
    return distributed.is_available() and distributed.is_initialized()


def is_kept(basis: Tensor) -> bool:
    """Whether an engine keeps the values of a parameter, and the module holds a part or a copy of them."""
    return is_distributed() and (_is_sharded(basis) or is_in_zero(basis))


def _is_sharded(basis: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(basis, DTensor)


def has_gathered_parameters(model: nn.Module) -> bool:
    """Whether FSDP2 puts other parameters, gathered from the shards, into a model while it runs.

    Raises:
        NotImplementedError: when it is the first version of FSDP.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise NotImplementedError(
            "The model is sharded by FSDP version 1, whose flattened parameters ReFT can't keep orthonormal. Use version 2: "
            "fsdp_version: 2 in the config of accelerate or axolotl, or torch's fully_shard."
        )
    return any(isinstance(module, FSDPModule) for module in modules)


def refuse_sharded_base(model: nn.Module) -> None:
    """An adapter to be trained on a base whose weights are shards already would be one of its own in each process.

    Raises:
        NotImplementedError: where that is so.
    """
    if is_distributed() and any(_is_sharded(parameter) for parameter in model.parameters()):
        raise NotImplementedError(
            "The base model's weights are sharded already, by tensor parallelism (tp_plan, tp_size) or fully_shard. An adapter "
            "added now would start and train apart in each process. Load the model without tp_plan, add the adapter, and have "
            "FSDP2 or DeepSpeed shard both. To run a trained adapter on it, load it with is_trainable=False."
        )


def refuse_split_sequences() -> None:
    """Positions are counted within a sequence, and a process that has only a part of each would count in that.

    Raises:
        NotImplementedError: when accelerate is set up so.
    """
    if splits_sequences():
        raise NotImplementedError(
            "Context or sequence parallelism gives each process a part of every sequence, and ReFT can't tell there which of its "
            "tokens are a prompt's first or last. Set cp_size and sp_size to 1 (in axolotl context_parallel_size: 1), or "
            "positions='all', which edits every token alike."
        )


@torch.no_grad()
def retract(bases: Sequence[Any]) -> None:
    """Orthonormalize the rows of kept bases. All processes have to call it, with the same bases in the same order."""
    sharded = [basis for basis in bases if _is_sharded(basis)]
    if sharded:
        _retract_sharded(sharded)
    in_zero = [basis for basis in bases if is_in_zero(basis)]
    if in_zero:
        _retract_in_zero(in_zero)


def _retract_sharded(bases: list[Any]) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    # All are under way before the first is waited for. Offloaded shards are sent, too, from the device of the mesh.
    gathering = []
    for basis in bases:
        mesh = basis.device_mesh
        shard = basis.to_local().to(mesh.device_type)
        layout = {"shape": basis.shape, "stride": basis.stride()}
        on_device = DTensor.from_local(shard, mesh, basis.placements, run_check=False, **layout)
        gathering.append(on_device.redistribute(placements=[Replicate()] * mesh.ndim, async_op=True))
    retracted = orthogonal.retracted([gathered.full_tensor() for gathered in gathering])
    for basis, gathered, value in zip(bases, gathering, retracted):
        whole = DTensor.from_local(value.contiguous(), basis.device_mesh, gathered.placements, run_check=False)
        basis.to_local().copy_(whole.redistribute(placements=basis.placements).to_local())


def _retract_in_zero(bases: list[Any]) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

    retracted = orthogonal.retracted([safe_get_full_fp32_param(basis) for basis in bases])
    for basis, value in zip(bases, retracted):
        if not hasattr(basis, "ds_tensor"):
            safe_set_full_fp32_param(basis, value)
            continue
        # ZeRO-3. Not by safe_set_full_fp32_param, which fails where a parameter does not divide evenly among the processes.
        size, rank = basis.ds_tensor.numel(), distributed.get_rank(basis.ds_process_group)
        mine = value.flatten()[rank * size : (rank + 1) * size]
        safe_set_local_fp32_param(basis, nn.functional.pad(mine, (0, size - mine.numel())))
