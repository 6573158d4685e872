"""The frontend's part: reads an adapter when it is first asked for, and finds the tokens to edit of each request.

A frontend is a process that takes requests: the program that uses `LLM`, or an API server.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from .adapters import Adapter, has_config, is_reft, load, refuse_change, rules_of, stamp
from .plans import PLAN, SCALE, SUBSPACES, make_plan
from .vllm_api import refuse_settings


class Turns:
    """Lets requests to an adapter, and changes of that adapter, reach the engine one after the other.

    A request carries the fingerprint of the adapter that it was planned for. So no request may be on its way while the
    adapter of its number is replaced or removed.
    """

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self._on_their_way: Counter[int] = Counter()
        self._changing: set[int] = set()

    @asynccontextmanager
    async def of_request(self, number: int) -> AsyncIterator[None]:
        async with self._condition:
            await self._condition.wait_for(lambda: number not in self._changing)
            self._on_their_way[number] += 1
        try:
            yield
        finally:
            self._on_their_way[number] -= 1
            async with self._condition:
                self._condition.notify_all()

    @asynccontextmanager
    async def of_change(self, number: int) -> AsyncIterator[None]:
        async with self._condition:
            await self._condition.wait_for(lambda: number not in self._changing)
            self._changing.add(number)
        try:
            async with self._condition:
                await self._condition.wait_for(lambda: not self._on_their_way[number])
            yield
        finally:
            self._changing.remove(number)
            async with self._condition:
                self._condition.notify_all()


class Frontend:
    """The ReFT adapters that one engine has loaded, as its frontend knows them.

    Args:
        vllm_config (`VllmConfig`): The settings of the engine.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.turns = Turns()
        self._adapters: dict[int, Adapter] = {}  # by LoRARequest.lora_int_id
        self._folders: dict[tuple[int, str], str | None] = {}

    @classmethod
    def of(cls, input_processor: Any) -> Frontend:
        """That of an engine, which is found by the engine's `InputProcessor`."""
        if "_reft" not in input_processor.__dict__:
            input_processor._reft = cls(input_processor.vllm_config)
        return input_processor._reft

    def folder_of(self, lora_request: Any) -> str | None:
        """The folder of the ReFT adapter that a LoRARequest names. None where the request names something else."""
        from vllm.lora.utils import get_adapter_absolute_path

        if lora_request is None:
            return None
        name = (lora_request.lora_int_id, lora_request.lora_path)
        if name in self._folders and not lora_request.load_inplace:
            return self._folders[name]
        path = get_adapter_absolute_path(lora_request.lora_path)  # of a hub id: asks the hub
        folder = path if is_reft(path) else None
        if has_config(path):
            self._folders[name] = folder
        return folder

    def known(self, lora_request: Any, folder: str | None) -> Adapter | None:
        """The loaded adapter of a LoRARequest's number. None where the number is free.

        Raises:
            ValueError: when the number is that of another adapter, or the adapter's folder has changed since.
        """
        adapter = self._adapters.get(lora_request.lora_int_id)
        if adapter is None:
            return None
        if folder != adapter.folder:
            raise ValueError(
                f"lora_int_id {lora_request.lora_int_id} of {lora_request.lora_name!r} is that of the ReFT adapter "
                f"{adapter.folder!r}. Give each adapter a number of its own."
            )
        try:
            changed = stamp(folder) != adapter.stamp
        except OSError:
            changed = False  # the folder is gone, and the workers keep what they have loaded
        if changed:
            raise ValueError(
                f"The ReFT adapter {folder!r} has changed since it was loaded as {lora_request.lora_name!r}. Load it "
                "anew (load_inplace: true), or under another name."
            )
        return adapter

    def read(self, lora_request: Any) -> Adapter | None:
        """Read the adapter of a LoRARequest from its folder, before the engine does. None where that is no ReFT
        adapter.

        Raises:
            ValueError: when the engine or the adapter is not served.
        """
        folder = self.folder_of(lora_request)
        known = None if lora_request.load_inplace and folder is not None else self.known(lora_request, folder)
        if folder is None or known is not None:
            return known
        refuse_settings(self.vllm_config)
        adapter = load(folder, self.vllm_config.lora_config.max_lora_rank)
        adapter.rules = rules_of(adapter, self.vllm_config.model_config)
        adapter.weights = {}  # the workers have them
        return adapter

    def loaded(self, number: int, adapter: Adapter) -> None:
        """Note that the engine has loaded what was read.

        Raises:
            ValueError: when the folder has changed since it was read: the engine may have loaded something else.
        """
        refuse_change(adapter.folder, adapter.fingerprint)
        self._adapters[number] = adapter

    def forget(self, number: int) -> None:
        """Note that the engine has removed an adapter."""
        self._adapters.pop(number, None)
        self._folders = {name: folder for name, folder in self._folders.items() if name[0] != number}

    def must_load(self, lora_request: Any) -> bool:
        """Whether a LoRARequest names a ReFT adapter that the engine has not loaded yet, or shall load anew.

        Raises:
            ValueError: see `known`; or there is no adapter: a worker would learn that in a step, and end the engine.
        """
        if lora_request is None:
            return False
        folder = self.folder_of(lora_request)
        if (lora_request.lora_int_id, lora_request.lora_path) not in self._folders:
            raise ValueError(f"No adapter found for {lora_request.lora_name!r} in {lora_request.lora_path!r}.")
        if folder is not None and lora_request.load_inplace:
            return True
        return self.known(lora_request, folder) is None and folder is not None

    def add_plan(self, request: Any) -> None:
        """Find the tokens that are edited of a request, and note them in it.

        Args:
            request (`EngineCoreRequest`): The request.

        Raises:
            ValueError: when its adapter can't be used for it.
        """
        params, lora_request = request.sampling_params, request.lora_request
        extra = (getattr(params, "extra_args", None) or {}) if params is not None else {}
        if PLAN in extra:
            raise ValueError(f"extra_args (vllm_xargs) has the key {PLAN!r}, which is the plugin's own. Leave it out.")
        if self.folder_of(lora_request) is None:
            return
        for refused, what in (
            (params is None, "pooling requests"),
            (request.prompt_embeds is not None or request.prompt_token_ids is None, "prompts given as embeddings"),
            (bool(request.mm_features), "prompts with images, audio or video"),
            (bool(request.resumable), "streaming sessions"),
        ):
            if refused:
                raise ValueError(f"The ReFT adapter {lora_request.lora_name!r} is not supported with {what}.")
        adapter = self._adapters.get(lora_request.lora_int_id)
        if adapter is None or adapter.rules is None:
            raise ValueError(f"The ReFT adapter {lora_request.lora_name!r} is not loaded.")
        prompt, chosen = list(request.prompt_token_ids), (extra.get(SUBSPACES), extra.get(SCALE))
        plan = make_plan(adapter.fingerprint, adapter.rules, prompt, *chosen, own_scale=adapter.config.scale)
        params.extra_args = plan.carried_by(extra)
        if lora_request.load_inplace:  # was done; the workers would read the folder again in each step
            request.lora_request = without_load_inplace(lora_request)

    def refuse_beam_search(self, lora_request: Any) -> None:
        """Each step of a beam search is a request of its own, whose prompt holds what was generated before.

        Raises:
            ValueError: for a ReFT adapter.
        """
        for one in lora_request if isinstance(lora_request, (list, tuple)) else [lora_request]:
            if self.folder_of(one) is not None:
                raise ValueError(f"The ReFT adapter {one.lora_name!r} is not supported with beam search.")


def without_load_inplace(lora_request: Any) -> Any:
    """A copy of a LoRARequest that asks for no more loading."""
    import msgspec

    return msgspec.structs.replace(lora_request, load_inplace=False)
