"""R whose values an engine owns: FSDP2 as shards, DeepSpeed's ZeRO as partitions of a float32 copy.

This module knows how to recognise a parameter of such an engine, how to gather its values and how to write them back.
orthogonal.py makes the rows of an R orthonormal.

A forward reads such a parameter from a copy that the engine fills anew each time, so a retraction of that copy would
be lost. Saving may be done by one process alone, or by an engine that does not call the module's hooks. So an R that
an engine owns is retracted at the end of the optimizer's step, in which all processes take part, in the engine's own
values: forwards, saves and loads then read orthonormal rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..engines_api import is_in_zero, splits_sequences
from ..interventions import orthogonal


def is_distributed() -> bool:
    """Whether torch.distributed is initialized in this process, so that an engine may own parameters."""
    return distributed.is_available() and distributed.is_initialized()


def is_owned_by_engine(parameter: Tensor) -> bool:
    """Whether an engine owns the values of a parameter, of which the module holds a shard or a copy."""
    return is_distributed() and (_is_sharded(parameter) or is_in_zero(parameter))


def _is_sharded(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def has_gathered_parameters(model: nn.Module) -> bool:
    """Whether FSDP2 shards a model, and so replaces its parameters by gathered copies while it runs.

    Raises:
        NotImplementedError: when the first version of FSDP shards it.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise NotImplementedError(
            "The model is sharded by FSDP version 1, whose flattened parameters ReFT can't keep orthonormal. Use "
            "version 2: fsdp_version: 2 in the config of accelerate or axolotl, or torch's fully_shard."
        )
    return any(isinstance(module, FSDPModule) for module in modules)


def refuse_sharded_base(model: nn.Module) -> None:
    """Refuse to add a trainable adapter to a base model whose weights are sharded already: each process would start
    and train an adapter of its own.

    Raises:
        NotImplementedError: when a parameter of the model is sharded.
    """
    if is_distributed() and any(_is_sharded(parameter) for parameter in model.parameters()):
        raise NotImplementedError(
            "The base model's weights are sharded already, by tensor parallelism (tp_plan, tp_size) or fully_shard. "
            "An adapter added now would start and train apart in each process. Load the model without tp_plan, add "
            "the adapter, and have FSDP2 or DeepSpeed shard both. To run a trained adapter on it, load it with "
            "is_trainable=False."
        )


def refuse_split_sequences() -> None:
    """Refuse context and sequence parallelism: a process that has only a part of each sequence can't count positions
    in the whole sequence.

    Raises:
        NotImplementedError: when accelerate is configured to split sequences.
    """
    if splits_sequences():
        raise NotImplementedError(
            "Context or sequence parallelism gives each process a part of every sequence, and ReFT can't tell there "
            "which of its tokens are a prompt's first or last. Set cp_size and sp_size to 1 (in axolotl "
            "context_parallel_size: 1), or positions='all', which edits every token alike."
        )


@torch.no_grad()
def retract_owned(parameters: Sequence[Any]) -> None:
    """Orthonormalize the rows of R that an engine owns, in the engine's values. A collective operation: every process
    calls it, with the same parameters in the same order.

    Args:
        parameters (`Sequence`): `DTensor`s or parameters of ZeRO, [G, R, D] each.
    """
    sharded = [R for R in parameters if _is_sharded(R)]
    if sharded:
        _retract_sharded(sharded)
    in_zero = [R for R in parameters if is_in_zero(R)]
    if in_zero:
        _retract_in_zero(in_zero)


def _retract_sharded(parameters: list[Any]) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    # All gathers are started before the first is waited for. Offloaded shards are moved to the mesh's device for it.
    gathering = []
    for R in parameters:
        mesh = R.device_mesh
        shard = R.to_local().to(mesh.device_type)
        layout = {"shape": R.shape, "stride": R.stride()}
        on_device = DTensor.from_local(shard, mesh, R.placements, run_check=False, **layout)
        gathering.append(on_device.redistribute(placements=[Replicate()] * mesh.ndim, async_op=True))
    retracted = orthogonal.retracted([gathered.full_tensor() for gathered in gathering])
    for R, gathered, value in zip(parameters, gathering, retracted):
        whole = DTensor.from_local(value.contiguous(), R.device_mesh, gathered.placements, run_check=False)
        R.to_local().copy_(whole.redistribute(placements=R.placements).to_local())


def _retract_in_zero(parameters: list[Any]) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

    retracted = orthogonal.retracted([safe_get_full_fp32_param(R) for R in parameters])
    for R, value in zip(parameters, retracted):
        if not hasattr(R, "ds_tensor"):
            safe_set_full_fp32_param(R, value)
            continue
        # ZeRO-3. safe_set_full_fp32_param fails here where a parameter does not divide evenly among the processes.
        size, process = R.ds_tensor.numel(), distributed.get_rank(R.ds_process_group)
        mine = value.flatten()[process * size : (process + 1) * size]
        safe_set_local_fp32_param(R, nn.functional.pad(mine, (0, size - mine.numel())))
