"""The tuner: what could become `src/peft/tuners/reft`. It imports torch, peft and transformers, and nothing of peft_reft outside itself.

Importing it registers REFT with PEFT. See four files first: config.py (what a user sets), layer.py (ReftLayer), interventions/apply.py (the
hot path) and forward/context.py (how a call of the model becomes a plan for its layers).
"""

from .config import ReftConfig
from .layer import ReftLayer
from .model import ReftModel
from .peft_type import register


__all__ = ["ReftConfig", "ReftLayer", "ReftModel"]

register(ReftConfig, ReftModel)
