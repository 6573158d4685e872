"""What ReFT relies on in PEFT that is private, or that PEFT calls by name.

A name that can't be imported shows by itself, and the message says which versions have it. A method that PEFT no longer calls would
be passed over in silence: `OVERRIDDEN` lists those that ReftModel and ReftLayer put in place of PEFT's own. They are looked for once,
before the first adapter is made.
"""

from __future__ import annotations

import functools

from .versions import gone, require


try:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        _get_in_out_features,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
        check_target_module_exists,
    )
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, register_peft_method
    from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
    from peft.utils.quantization_utils import (
        QuantizationBackend,
        get_quantization_kwargs,
        resolve_quantization_backend,
    )
except ImportError as error:
    raise ImportError(gone("peft", f"what can't be imported ({error})")) from error

NoMatchingModule: type[ValueError] = ValueError
try:
    from peft.utils.error import NoMatchingPeftModuleError

    NoMatchingModule = NoMatchingPeftModuleError
except ImportError:  # peft 0.20 raises a ValueError as such
    pass

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "NoMatchingModule",
    "PeftType",
    "QuantizationBackend",
    "_get_in_out_features",
    "_maybe_include_all_linear_layers",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "get_pattern_key",
    "get_quantization_kwargs",
    "register_peft_method",
    "resolve_quantization_backend",
]

# Methods of PEFT's that ReFT's own stand in for.
OVERRIDDEN = {
    "BaseTuner": (
        "_cast_adapter_dtype",
        "_check_target_module_exists",
        "_create_and_replace",
        "_mark_only_adapters_as_trainable",
        "_prepare_adapter_config",
        "_prepare_model",
        "_replace_module",
        "_unload_and_optionally_merge",
        "delete_adapter",
        "forward",
        "inject_adapter",
        "merge_adapter",
    ),
    "BaseTunerLayer": (
        "_move_adapter_to_device_of_base_layer",
        "delete_adapter",
        "enable_adapters",
        "get_base_weight",
        "merge",
        "set_base_weight",
        "unmerge",
    ),
}
# Called by PEFT 0.21 and newer. PEFT 0.20 finds an adapter's tensors by their names alone, and checks nothing before it loads them.
SINCE_0_21 = ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")
# PEFT does not declare this one: PeftModel asks a tuner for it where a call has adapter_names.
ASKED_FOR = "_enable_peft_forward_hooks"


@functools.cache
def check_peft() -> None:
    """Look for the pieces that ReFT relies on, once.

    Raises:
        RuntimeError: naming the piece that the installed PEFT lacks, and the versions known to work.
    """
    import peft

    where = "peft.tuners.tuners_utils"
    for owner, names in OVERRIDDEN.items():
        require("peft", *(f"{where}:{owner}.{name}" for name in names))
    if not peft.__version__.startswith("0.20."):
        require("peft", *(f"{where}:BaseTuner.{name}" for name in SINCE_0_21))
    if (
        ASKED_FOR
        not in peft.PeftModel.forward.__code__.co_names + peft.PeftModel._enable_peft_forward_hooks.__code__.co_names
    ):
        raise RuntimeError(gone("peft", f"PeftModel's call of {ASKED_FOR}"))
