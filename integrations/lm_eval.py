"""The lm-evaluation-harness, with ReFT.

    python -m peft_reft.integrations.lm_eval --model hf --model_args pretrained=...,peft=...

Everything is the harness's own: this module makes PEFT know ReFT, by being imported, tells likelihood requests where
their prompts end, and hands over to the harness's command line. From Python, `import peft_reft.integrations.lm_eval`
before a model is made does the same.

The harness scores a continuation by one forward over context and continuation, without labels, and so without a word
of where the one ends and the other begins. ReFT would take both for prompt, and edit the end of the continuation. Here
requests whose prompts are equally long are scored together, and the model is told that length. A context's prompt is
what `generate` would take for it, so likelihoods are those of generating the same tokens. `generate_until` goes
through `generate`, which knows its prompts already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import peft_reft  # noqa: F401 - makes PEFT know ReFT
from peft_reft.tuner.forward.context import ForwardContext
from peft_reft.tuner.positions.batch import Batch, select_tokens
from peft_reft.tuner.positions.spec import Rules
from peft_reft.tuner.versions import require


# Of the harness's model for transformers: what is wrapped, and what is asked of it.
RELIED_ON = ("_loglikelihood_tokens", "loglikelihood_rolling", "tok_encode", "max_length", "_model_call")

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"This needs the lm-evaluation-harness: pip install 'peft-reft[eval]'. {error}") from error

Request = tuple[Any, list[int], list[int]]  # its text, and the tokens of context and continuation


def rules_in_use(model: nn.Module) -> list[Rules]:
    """Those of the ReFT adapters that are switched on and edit some tokens of a prompt."""
    context = ForwardContext.of(model)
    return [] if context is None else context.rules_in_use()


def prompt_tokens(lm: Any, request: Request) -> list[int]:
    """The tokens of a request's context, as `generate` would be given them.

    The harness counts spaces and line ends at the end of a context to the continuation. For `generate`, and in
    training, they belong to the prompt, and its last tokens are edited. Where context and continuation share a token,
    the prompt is what the harness has it to be.
    """
    text, context, continuation = request
    if text is None or not text[0]:
        return context
    tokens, whole = lm.tok_encode(text[0]), context + continuation
    return tokens if len(tokens) < len(whole) and whole[: len(tokens)] == tokens else context


def prompt_length(rules: list[Rules], context: list[int]) -> int | None:
    """How many tokens of a context are its prompt. None: it has several prompts, which the adapter's template finds by
    itself.

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
def told_prompts(model: nn.Module, length: int | None) -> Iterator[None]:
    """A context in which each forward of a model is told that all its prompts have this length. None: it is told
    nothing."""
    if length is None:
        yield
        return

    def tell(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = args[0] if args else kwargs["input_ids"]
        return args, {**kwargs, "prompt_lengths": torch.full((ids.shape[0],), length, device=ids.device)}

    hook = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def install() -> None:
    """Tell the prompts of likelihood requests to ReFT, in every model of the harness that is one of transformers'.

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
        groups: dict[int | None, list[int]] = {}
        lengths: dict[tuple[int, ...], int | None] = {}
        for index, request in enumerate(requests):
            cut = max(0, len(request[1]) + len(request[2]) - self.max_length - 1)  # the harness cuts off the start
            kept = tuple(prompt_tokens(self, request)[cut:])
            if kept not in lengths:
                lengths[kept] = prompt_length(rules, list(kept))
            groups.setdefault(lengths[kept], []).append(index)
        results: list[Any] = [None] * len(requests)
        for length in sorted(groups, key=lambda length: -(length or 0)):  # the longest first, as the harness has it
            with told_prompts(self.model, length):
                group = [requests[index] for index in groups[length]]
                scored = score(self, group, disable_tqdm=True, override_bs=override_bs)
            for index, result in zip(groups[length], scored):
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
    """The harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
