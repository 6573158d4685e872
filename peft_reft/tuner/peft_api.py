"""The private names of PEFT that ReFT relies on, and the methods of ReFT that PEFT calls by name.

If a name can't be imported, the import raises an error that lists the versions that have it. If PEFT renamed a method
that ReFT overrides, PEFT would call its own method and raise no error. So `OVERRIDDEN` lists the methods that
ReftModel and ReftLayer override, and `check_peft` looks for them once, before the first adapter is made.
"""

from __future__ import annotations

import functools

from .versions import gone, require, require_names


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
except ImportError:  # PEFT 0.20 has no class of its own for this error and raises a plain ValueError
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

# The methods of PEFT's base classes that ReftModel and ReftLayer override. merging.py calls the two of base weights.
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
# PEFT calls these from 0.21 on. PEFT 0.20 finds an adapter's tensors by their names alone and loads them unchecked.
SINCE_0_21 = ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")
# No base class of PEFT declares this method: PeftModel's own, of the same name, calls it on the tuner where a call has
# adapter_names.
ASKED_FOR = "_enable_peft_forward_hooks"


@functools.cache
def check_peft() -> None:
    """Check, once in a process, that PEFT has the methods that ReFT overrides.

    Raises:
        RuntimeError: naming the piece that the installed PEFT lacks, and the versions known to work.
    """
    import peft

    where = "peft.tuners.tuners_utils"
    for owner, names in OVERRIDDEN.items():
        require("peft", *(f"{where}:{owner}.{name}" for name in names))
    if not peft.__version__.startswith("0.20."):
        require("peft", *(f"{where}:BaseTuner.{name}" for name in SINCE_0_21))
    require("peft", f"peft:PeftModel.{ASKED_FOR}")
    require_names("peft", getattr(peft.PeftModel, ASKED_FOR), "base_model", ASKED_FOR)
