"""ReFT (Representation Finetuning, arXiv 2404.03592) as a PEFT tuner.

Importing this package registers ReFT with PEFT: `get_peft_model`, `PeftModel.from_pretrained`,
`AutoPeftModelForCausalLM` and `PeftConfig.from_pretrained` then take it as they take LoRA. Where it is installed,
PEFT's own import imports it (peft_reft_autoload).
"""

from peft_reft_autoload import serve

from .tools.collator import ColumnsCollator, PromptLengthsCollator
from .tools.explain import explain_positions
from .tools.explain_edits import explain_edits
from .tools.resuming import last_complete_checkpoint
from .tools.strength import rescale_adapter_scale
from .tuner import ReftConfig, ReftLayer, ReftModel
from .tuner.chat_template import find_response_template


__version__ = "0.1.0"
__all__ = [
    "ColumnsCollator",
    "PromptLengthsCollator",
    "ReftConfig",
    "ReftLayer",
    "ReftModel",
    "explain_edits",
    "explain_positions",
    "find_response_template",
    "last_complete_checkpoint",
    "rescale_adapter_scale",
]

serve()  # Trainer and the lm-evaluation-harness, as they are imported
