"""Checkpoints of pyreft and of the adapters library become PEFT adapters, and PEFT adapters become pyreft's.

    files.py        reads what others wrote: tensors and JSON, and nothing that could run
    orthogonal.py   torch's parametrization of orthonormal matrices, from what is saved of it and back
    components.py   pyvene's names for places in a model <-> names of modules
    skeleton.py     the base model without its weights: which modules it has, and which of them are heads
    checkpoint.py   what any checkpoint comes down to, and how it is written as a PEFT adapter
    pyreft.py, adapters.py, to_pyreft.py   the layouts themselves

Neither pyreft nor adapters is imported: their files are read and written as they are.
"""

from .checkpoint import Conversion
from .from_adapters import convert_adapters
from .from_pyreft import convert_pyreft
from .to_pyreft import export_pyreft


__all__ = ["Conversion", "convert_adapters", "convert_pyreft", "export_pyreft"]
