"""What ReFT relies on in accelerate and DeepSpeed that is private: the marks by which they know what they have taken hold of.

A mark under another name would be passed over in silence. So each is looked for in the code of the library that sets or reads it,
accelerate's before the first adapter is made, DeepSpeed's before its first parameter is looked at.
"""

from __future__ import annotations

import functools
import sys
from types import FunctionType
from typing import Any

from torch import nn

from .versions import gone


try:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState
except ImportError as error:
    raise ImportError(gone("accelerate", f"what can't be imported ({error})")) from error

__all__ = ["remove_hook_from_module"]

HOOK = "_hf_hook"  # accelerate's hook on a module that it has offloaded, or spread over devices
ZERO_3, ZERO_2 = "ds_id", "_hp_mapping"  # DeepSpeed's marks on parameters whose values it keeps
PARALLELISM = "parallelism_config"  # in accelerate's shared state


@functools.cache
def check_accelerate() -> None:
    """Look for the pieces of accelerate that ReFT relies on, once.

    Raises:
        RuntimeError: naming the piece that is gone, and the versions known to work.
    """
    _require_names("accelerate", add_hook_to_module, HOOK)
    _require_names("accelerate", AlignDevicesHook.__init__, "execution_device")
    _require_names("accelerate", AcceleratorState.__init__, "_shared_state", PARALLELISM)
    for name in ("cp_enabled", "sp_enabled"):
        if not hasattr(ParallelismConfig, name):
            raise RuntimeError(gone("accelerate", f"ParallelismConfig.{name}"))


@functools.cache
def check_deepspeed() -> None:
    """The same for DeepSpeed, where a process has imported it."""
    from deepspeed.utils import safe_get_full_fp32_param

    _require_names("deepspeed", safe_get_full_fp32_param, ZERO_3, ZERO_2)


def _require_names(library: str, function: Any, *names: str) -> None:
    assert isinstance(function, FunctionType)
    code = function.__code__
    for name in names:
        if name not in code.co_names and name not in code.co_consts:
            raise RuntimeError(gone(library, f"the name {name!r} in {function.__qualname__}"))


def has_hook(module: nn.Module) -> bool:
    """Whether accelerate has a hook on a module."""
    return HOOK in vars(module)


def hooked_device(module: nn.Module) -> Any:
    """The device to which accelerate's hooks on a module, or on its parts, bring weights. None: there is no such hook."""
    hooks = (vars(part).get(HOOK) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), None)


def splits_sequences() -> bool:
    """Whether accelerate gives each process a part of every sequence (context or sequence parallelism)."""
    config = AcceleratorState._shared_state.get(PARALLELISM)
    return config is not None and (config.cp_enabled or config.sp_enabled)


def is_in_zero(parameter: Any) -> bool:
    """Whether DeepSpeed keeps the values of a parameter. The marks are those by which its own `safe_get_full_fp32_param` goes."""
    if "deepspeed" not in sys.modules:
        return False
    check_deepspeed()
    return hasattr(parameter, ZERO_3) or hasattr(parameter, ZERO_2)
