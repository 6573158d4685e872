"""ReFT adapters in vLLM, served as LoRA adapters are.

vLLM loads this plugin in each of its processes (entry point group `vllm.general_plugins`). Where vLLM was started with
`--enable-lora`, it then takes the folder of a ReFT adapter wherever it takes that of a LoRA:
`--lora-modules name=folder`, `LoRARequest`, `/v1/load_lora_adapter`. docs/serving.md says what is supported.
"""

from .plugin import register


__all__ = ["register"]
