"""ReFT adapters in vLLM, served as LoRA adapters are.

vLLM loads this plugin in each of its processes (entry point group `vllm.general_plugins`). With the server started with
`--enable-lora --enforce-eager`, a folder whose adapter_config.json says `REFT` may stand wherever vLLM takes a LoRA:
`--lora-modules name=folder`, `LoRARequest`, `/v1/load_lora_adapter`. docs/serving.md says what is supported.
"""

from .plugin import register


__all__ = ["register"]
