"""The lm-evaluation-harness with ReFT adapters.

    lm_eval --model hf --model_args pretrained=...,peft=...
    python -m peft_reft.integrations.lm_eval ...       # where the autoload is switched off

Importing this module registers ReFT with PEFT and patches the harness's model for transformers so that likelihood
requests reach the adapter with the length of their prompts. peft_reft_autoload imports it once both peft_reft and the
harness's model are imported.

The harness scores a continuation by one forward over context and continuation, without labels. Nothing says where the
context ends, so ReFT would take both for prompt and edit the end of the continuation. Here requests whose prompts have
the same length are scored together, and that length is passed to the model as `prompt_lengths`. The prompt of a
context is the one that `generate` would edit, so likelihoods are those of generating the same tokens. `generate_until`
needs no patch: it calls `generate`, which knows its prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import peft_reft  # noqa: F401 - registers ReFT with PEFT
from peft_reft.tuner.forward.context import ForwardContext
from peft_reft.tuner.positions.batch import Batch, select_tokens
from peft_reft.tuner.positions.spec import Rules
from peft_reft.tuner.versions import require


# The methods of the harness's model for transformers that are wrapped or called.
RELIED_ON = ("_loglikelihood_tokens", "loglikelihood_rolling", "tok_encode", "max_length", "_model_call")

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"This needs the lm-evaluation-harness: pip install 'peft-reft[eval]'. {error}") from error

# (context, continuation) as text, tokens of the context, tokens of the continuation.
Request = tuple[Any, list[int], list[int]]


def rules_in_use(model: nn.Module) -> list[Rules]:
    """The rules of the active ReFT adapters whose edits depend on where the prompt is: all but `positions="all"`."""
    context = ForwardContext.of(model)
    return [] if context is None else context.rules_in_use()


def prompt_tokens(lm: Any, request: Request) -> list[int]:
    """The tokens of a request's context, as `generate` would be given them.

    The harness moves spaces and line ends from the end of a context to the continuation. For `generate`, and in
    training, they belong to the prompt, whose last tokens are edited. Where context and continuation share a token,
    the prompt is the harness's context.

    Args:
        lm (`lm_eval.models.huggingface.HFLM`): The harness's model.
        request (`tuple`): One of its likelihood requests.
    """
    text, context, continuation = request
    if text is None or not text[0]:
        return context
    tokens, whole = lm.tok_encode(text[0]), context + continuation
    return tokens if len(tokens) < len(whole) and whole[: len(tokens)] == tokens else context


def prompt_length(rules: list[Rules], context: list[int]) -> int | None:
    """How many tokens of a context are its prompt.

    Args:
        rules (`list[Rules]`): The rules of the adapters in use.
        context (`list[int]`): The tokens of the context.

    Returns:
        `int`, *optional*: The number of tokens. None: the context has several prompts, which no length can say. The
            adapter finds them by its response template.

    Raises:
        ValueError: when adapters that are used together find different prompts.
    """
    found: set[int | None] = set()
    for one in rules:
        ids = torch.tensor([context])
        prompt_BS = select_tokens(one, Batch((1, len(context)), ids.device, input_ids=ids), training=False).prompt_BS
        assert prompt_BS is not None
        length = int(prompt_BS.sum())
        found.add(length if bool(prompt_BS[0, :length].all()) else None)
    if len(found) > 1:
        raise ValueError(
            "The adapters in use find different prompts in a context: their response_template or prompt_boundary "
            "differ. Evaluate them one at a time, or give them the same."
        )
    return found.pop()


@contextmanager
def with_prompt_lengths(model: nn.Module, length: int | None) -> Iterator[None]:
    """A context in which each forward of a model gets `prompt_lengths` [B], all of this length. None: it gets none."""
    if length is None:
        yield
        return

    def add_lengths(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = args[0] if args else kwargs["input_ids"]
        return args, {**kwargs, "prompt_lengths": torch.full((ids.shape[0],), length, device=ids.device)}

    hook = model.register_forward_pre_hook(add_lengths, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def install() -> None:
    """Patch the harness's model for transformers: likelihood requests of ReFT adapters get their prompt lengths.

    Raises:
        RuntimeError: naming the piece of the harness that is gone, and the versions known to work.
    """
    if getattr(HFLM, "_tells_reft", False):
        return
    require("lm_eval", *(f"lm_eval.models.huggingface:HFLM.{name}" for name in RELIED_ON))
    score, score_rolling = HFLM._loglikelihood_tokens, HFLM.loglikelihood_rolling

    def _loglikelihood_tokens(
        self: Any, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rules = [] if self.backend == "seq2seq" else rules_in_use(self.model)
        if not rules:
            return score(self, requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        by_length: dict[int | None, list[int]] = {}
        lengths: dict[tuple[int, ...], int | None] = {}
        for index, request in enumerate(requests):
            cut = max(0, len(request[1]) + len(request[2]) - self.max_length - 1)  # the harness cuts off the start
            context = tuple(prompt_tokens(self, request)[cut:])
            if context not in lengths:
                lengths[context] = prompt_length(rules, list(context))
            by_length.setdefault(lengths[context], []).append(index)
        results: list[Any] = [None] * len(requests)
        for length in sorted(by_length, key=lambda length: -(length or 0)):  # the longest first, as the harness does
            with with_prompt_lengths(self.model, length):
                chosen = [requests[index] for index in by_length[length]]
                scored = score(self, chosen, disable_tqdm=True, override_bs=override_bs)
            for index, result in zip(by_length[length], scored):
                results[index] = result
        return results

    def loglikelihood_rolling(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        if self.backend != "seq2seq" and (rules := rules_in_use(self.model)):
            raise ValueError(
                f"{rules[0]}: a task of perplexity (loglikelihood_rolling) scores texts that have no prompt, and ReFT "
                "edits tokens of the prompt. Leave such tasks out, or train with positions='all'."
            )
        return score_rolling(self, requests, disable_tqdm=disable_tqdm)

    HFLM._loglikelihood_tokens = _loglikelihood_tokens
    HFLM.loglikelihood_rolling = loglikelihood_rolling
    HFLM._tells_reft = True


install()


def main() -> None:
    """Run the harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
