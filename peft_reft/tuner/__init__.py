"""The tuner: exactly the files that could become `src/peft/tuners/reft`. They import torch, peft, transformers and
accelerate, and nothing of peft_reft outside this folder.

An import of this folder registers REFT with PEFT. See four files first: config.py (what a user sets), layer.py
(ReftLayer), interventions/apply.py (the hot path) and forward/context.py (how a call of the model becomes a plan for
its layers).
"""

from .config import ReftConfig
from .layer import ReftLayer
from .model import ReftModel
from .peft_type import register


__all__ = ["ReftConfig", "ReftLayer", "ReftModel"]

register(ReftConfig, ReftModel)
