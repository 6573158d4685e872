"""A cache that holds the beginning of a prompt, copied and used for whole prompts: a recipe of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from models import CACHE, build, prompts, randomize
from peft import PeftModel, get_peft_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from peft_reft import ReftConfig


OPTIONS = {
    "max_new_tokens": 5,
    "do_sample": False,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}
PREFIX = 20


def adapted(name: str = "llama", **settings) -> PeftModel:
    settings = {"r": 4, "positions": "f2+l3", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(build(name), ReftConfig(**settings)).eval()
    randomize(model)
    return model


def read(model: PeftModel, ids: torch.Tensor, cache=None):
    """The cache after a prefix was read by a forward of its own."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **{CACHE: cache})[CACHE]


def generate(model: PeftModel, ids: torch.Tensor, cache=None) -> torch.Tensor:
    """The logits of each generated token."""
    used = {} if cache is None else {CACHE: cache}
    return torch.stack(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **used, **OPTIONS).logits)


def question(length: int, template: bool, seed: int = 3) -> torch.Tensor:
    """A whole prompt: the prefix and a question, which may end with the response template [5, 6]."""
    ids = torch.cat([prompts(PREFIX)["input_ids"], prompts(length, seed=seed)["input_ids"]], dim=1).clamp(min=7)
    return torch.cat([ids, torch.tensor([[5, 6]])], dim=1) if template else ids


@pytest.mark.parametrize("length", [1, 2, 3, 12])
@pytest.mark.parametrize("template", [None, [5, 6]])
def test_a_prefix_read_once_serves_every_question(template, length):
    model = adapted(response_template=template)
    filled = read(model, question(1, False)[:, :PREFIX])
    for seed in (3, 4):
        ids = question(length, template is not None, seed)
        torch.testing.assert_close(
            generate(model, ids, copy.deepcopy(filled)), generate(model, ids), rtol=1e-4, atol=1e-4
        )
    assert filled.get_seq_length() == PREFIX  # a copy was used


def test_most_of_the_prefix_is_not_read_again():
    model, fed = adapted(), []
    filled = read(model, question(1, False)[:, :PREFIX])
    model.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate(model, question(9, False), filled)
    assert fed[0] == 9 + 3  # the question, and the last tokens of the prefix, which were edited


def test_a_static_cache():
    model = adapted()
    cache = StaticCache(config=model.config, max_cache_len=64)
    filled, ids = read(model, question(1, False)[:, :PREFIX], cache), question(9, False)
    if hasattr(StaticLayer, "crop"):
        torch.testing.assert_close(generate(model, ids, filled), generate(model, ids), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="StaticCache.*holds 20 tokens.*from token 17 on.*without a cache"):
            generate(model, ids, filled)


@pytest.mark.parametrize("name", ["mistral, sliding window", "falcon_h1, mamba beside attention"])
def test_what_can_not_be_taken_back_is_refused(name):
    model = adapted(name)
    filled = read(model, question(1, False)[:, :PREFIX])
    with pytest.raises(ValueError, match="holds 20 tokens that were read as a prompt of their own.*without a cache"):
        generate(model, question(9, False), filled)


def test_a_prefix_for_several_questions_at_once():
    model = adapted()
    filled = read(model, question(1, False)[:, :PREFIX])
    filled.batch_repeat_interleave(2)
    ids = torch.cat([question(9, False, seed) for seed in (3, 4)])
    torch.testing.assert_close(generate(model, ids, filled), generate(model, ids), rtol=1e-4, atol=1e-4)


def test_a_prefix_read_with_another_adapter():
    model = adapted(positions="f2")
    model.add_adapter("other", ReftConfig(r=4, positions="f2", task_type="CAUSAL_LM"))
    randomize(model)
    filled = read(model, question(1, False)[:, :PREFIX])
    model.set_adapter("other")
    ids = question(9, False)
    torch.testing.assert_close(generate(model, ids, filled), generate(model, ids), rtol=1e-4, atol=1e-4)


def test_what_generate_wrote_is_left_as_it_is():
    """A cache that generate has used once is a conversation's, whose earlier turns keep their edits."""
    model = adapted()
    filled, ids = read(model, question(1, False)[:, :PREFIX]), question(9, False)
    written = model.generate(input_ids=ids, **{CACHE: filled}, **OPTIONS).sequences
    length, fed = filled.get_seq_length(), []
    model.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate(model, torch.cat([written, ids[:, -4:]], dim=1), filled)
    assert fed[0] == written.shape[1] + 4 - length


def test_a_prompt_fed_in_parts_by_hand():
    """Each part says how long the whole prompt is."""
    model, ids = adapted(), question(9, False)
    told = {"prompt_lengths": torch.tensor([ids.shape[1]])}
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        filled = model(input_ids=ids[:, :PREFIX], use_cache=True, **told)[CACHE]
        middle = model(input_ids=ids[:, PREFIX:-2], use_cache=True, **told, **{CACHE: filled})[CACHE]
        rest = model(input_ids=ids[:, -2:], **told, **{CACHE: middle}).logits[:, -1]
        torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-4)
        alone = model(input_ids=ids[:, :PREFIX], use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="holds 20 tokens.*Pass prompt_lengths.*first part, too"):
            model(input_ids=ids[:, PREFIX:], **told, **{CACHE: alone})


def test_a_prefix_whose_prompt_is_told_is_not_read_again():
    model, fed, ids = adapted(), [], question(9, False)
    with torch.no_grad():
        told = {"prompt_lengths": torch.tensor([ids.shape[1]])}
        filled = model(input_ids=ids[:, :PREFIX], use_cache=True, **told)[CACHE]
    model.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    torch.testing.assert_close(generate(model, ids, filled), generate(model, ids), rtol=1e-4, atol=1e-4)
    assert fed[0] == 9
