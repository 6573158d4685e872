"""The frontend's part: reads an adapter when it is first asked for, and finds the tokens to edit of each request.

A frontend is a process that takes requests: the program that uses `LLM`, or an API server.
"""

from __future__ import annotations

from typing import Any

from .adapters import Adapter, is_reft, load, rules_of, stamp
from .plans import PLAN, SUBSPACES, make_plan
from .vllm_api import refuse_settings


_adapters: dict[tuple[int, str], Adapter] = {}  # (LoRARequest.lora_int_id, folder) -> adapter


def folder_of(lora_request: Any) -> str | None:
    """The folder of the ReFT adapter that a LoRARequest names. None where it names something else."""
    from vllm.lora.utils import get_adapter_absolute_path

    if lora_request is None:
        return None
    folder = get_adapter_absolute_path(lora_request.lora_path)
    known = (lora_request.lora_int_id, folder) in _adapters
    return folder if known or is_reft(folder) else None


def adapter_of(lora_request: Any, folder: str, vllm_config: Any, anew: bool = False) -> Adapter:
    """The ReFT adapter that a LoRARequest names.

    Args:
        lora_request (`LoRARequest`): The request.
        folder (`str`): Its folder.
        vllm_config (`VllmConfig`): The settings of the engine.
        anew (`bool`): Whether to read the folder, whatever was read before.

    Raises:
        ValueError: when the engine or the adapter is not served, or the folder has changed since it was read.
    """
    refuse_settings(vllm_config)
    known = (lora_request.lora_int_id, folder)
    adapter = _adapters.get(known)
    if adapter is None or anew:
        adapter = load(folder, vllm_config.lora_config.max_lora_rank)
        adapter.rules = rules_of(adapter, vllm_config.model_config)
        adapter.weights = {}  # the workers have them
        _adapters[known] = adapter
        return adapter
    try:
        changed = stamp(folder) != adapter.stamp
    except OSError:
        changed = False  # the folder is gone, and the workers keep what they have loaded
    if changed:
        raise ValueError(
            f"The ReFT adapter {folder!r} has changed since it was loaded as {lora_request.lora_name!r}. Load it anew "
            "(load_inplace: true), or under another name."
        )
    return adapter


def add_plan(request: Any, lora_request: Any, vllm_config: Any) -> None:
    """Find the tokens that are edited of a request, and note them in it.

    Args:
        request (`EngineCoreRequest`): The request.
        lora_request (`LoRARequest`, *optional*): The adapter that it asks for.
        vllm_config (`VllmConfig`): The settings of the engine.

    Raises:
        ValueError: when the adapter can't be used for it.
    """
    params = request.sampling_params
    extra = (getattr(params, "extra_args", None) or {}) if params is not None else {}
    if PLAN in extra:
        raise ValueError(f"extra_args (vllm_xargs) has the key {PLAN!r}, which is the plugin's own. Leave it out.")
    folder = folder_of(lora_request)
    if folder is None:
        return
    for refused, what in (
        (params is None, "pooling requests"),
        (request.prompt_embeds is not None or request.prompt_token_ids is None, "prompts given as embeddings"),
        (bool(request.mm_features), "prompts with images, audio or video"),
        (bool(request.resumable), "streaming sessions"),
    ):
        if refused:
            raise ValueError(f"The ReFT adapter {lora_request.lora_name!r} is not supported with {what}.")
    adapter = adapter_of(lora_request, folder, vllm_config)
    assert adapter.rules is not None
    plan = make_plan(adapter.fingerprint, adapter.rules, list(request.prompt_token_ids), extra.get(SUBSPACES))
    params.extra_args = plan.carried_by(extra)


def refuse_beam_search(lora_request: Any) -> None:
    """Each step of a beam search is a request of its own, whose prompt holds what was generated before.

    Raises:
        ValueError: for a ReFT adapter.
    """
    for one in lora_request if isinstance(lora_request, (list, tuple)) else [lora_request]:
        if folder_of(one) is not None:
            raise ValueError(f"The ReFT adapter {one.lora_name!r} is not supported with beam search.")
