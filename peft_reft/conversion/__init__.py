"""Checkpoints of pyreft and of the adapters library become PEFT adapters, and PEFT adapters become pyreft's.

    from_pyreft.py, from_adapters.py   read a checkpoint of each library
    to_pyreft.py      writes a PEFT adapter as a checkpoint of pyreft
    checkpoint.py     a checkpoint in memory, whatever library it comes from, and how it is written as a PEFT adapter
    base_model.py     the base model without its weights: which modules it has, and which of them are heads
    pyvene_places.py  pyvene's names for places in a model <-> names of modules
    householder.py    R <-> the two tensors that torch's orthogonal parametrization saves of it
    files.py          reads tensors and JSON, and refuses files that could run code

Neither pyreft nor adapters is imported: their files are read and written as they are.
"""

from .checkpoint import Conversion
from .from_adapters import convert_adapters
from .from_pyreft import convert_pyreft
from .to_pyreft import export_pyreft


__all__ = ["Conversion", "convert_adapters", "convert_pyreft", "export_pyreft"]
