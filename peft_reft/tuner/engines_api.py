"""Private names of accelerate and DeepSpeed that ReFT relies on: the attributes with which they mark the modules and
parameters that they manage.

If a release renamed such an attribute, ReFT would find no mark and raise no error. So each name is looked for in the
code of the library that sets or reads it: accelerate's before the first adapter is made, DeepSpeed's before the first
parameter is examined for its marks.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from .versions import gone, require_names


try:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState
except ImportError as error:
    raise ImportError(gone("accelerate", f"what can't be imported ({error})")) from error

__all__ = ["remove_hook_from_module"]

HOOK = "_hf_hook"  # accelerate's hook on a module that it has offloaded, or spread over devices
ZERO_3, ZERO_2 = "ds_id", "_hp_mapping"  # DeepSpeed's marks on the parameters of a ZeRO stage
PARALLELISM = "parallelism_config"  # a key of accelerate's shared state


@functools.cache
def check_accelerate() -> None:
    """Check, once in a process, that accelerate has the names that ReFT relies on.

    Raises:
        RuntimeError: naming the piece that the installed accelerate lacks, and the versions known to work.
    """
    require_names("accelerate", add_hook_to_module, HOOK)
    require_names("accelerate", AlignDevicesHook.__init__, "execution_device")
    require_names("accelerate", AcceleratorState.__init__, "_shared_state", PARALLELISM)
    for name in ("cp_enabled", "sp_enabled"):
        if not hasattr(ParallelismConfig, name):
            raise RuntimeError(gone("accelerate", f"ParallelismConfig.{name}"))


@functools.cache
def check_deepspeed() -> None:
    """Check, once in a process, that DeepSpeed has the names that ReFT relies on. DeepSpeed must be installed.

    Raises:
        RuntimeError: naming the piece that the installed DeepSpeed lacks, and the versions known to work.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    require_names("deepspeed", safe_get_full_fp32_param, ZERO_3, ZERO_2)


def has_hook(module: nn.Module) -> bool:
    """Whether accelerate has a hook on a module."""
    return HOOK in vars(module)


def hooked_device(module: nn.Module) -> Any:
    """The device to which accelerate's hooks on a module, or on its parts, bring weights. None: no hook names one."""
    hooks = (vars(part).get(HOOK) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), None)


def splits_sequences() -> bool:
    """Whether accelerate gives each process a part of every sequence (context or sequence parallelism)."""
    config = AcceleratorState._shared_state.get(PARALLELISM)
    return config is not None and (config.cp_enabled or config.sp_enabled)


def is_in_zero(parameter: Any) -> bool:
    """Whether DeepSpeed's ZeRO owns the values of a parameter: it has a mark that `safe_get_full_fp32_param` reads."""
    if "deepspeed" not in sys.modules:
        return False
    check_deepspeed()
    return hasattr(parameter, ZERO_3) or hasattr(parameter, ZERO_2)
