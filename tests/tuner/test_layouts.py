"""The layout of a block's output is established, not inferred from sizes that agree."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers as t
from models import GROUPED, build, prompts, randomize
from peft import get_peft_model
from torch import nn
from zoo import tiny

from peft_reft import ReftConfig, ReftLayer


class Block(nn.Module):
    """Returns [rows, tokens, width] or, swapped, [tokens, rows, width]."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.out_features = 8
        self.swapped = swapped
        self.runs = 0

    def forward(self, h):
        self.runs += 1
        h = self.norm(self.linear(h))
        return h.transpose(0, 1) if self.swapped else h


class Tokens(nn.Module):
    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.block = Block(swapped)
        self.out = nn.Linear(8, 20)

    def forward(self, input_ids, attention_mask=None):
        h = self.block(self.embedding(input_ids))
        return self.out(h.transpose(0, 1) if self.block.swapped else h)


def adapted(swapped: bool):
    torch.manual_seed(0)
    model = get_peft_model(Tokens(swapped), ReftConfig(r=2, positions="f1", target_modules=["block"]))
    randomize(model)
    return model.eval()


def changed(model, ids):
    with torch.no_grad():
        edited = model(input_ids=ids)
        with model.disable_adapter():
            return ((edited - model(input_ids=ids)).abs().amax(-1) > 1e-4).nonzero().tolist()


def test_a_square_first_batch_does_not_hide_a_swapped_layout():
    with pytest.raises(ValueError, match=r"'block' may return \[tokens, rows, width\].*\[16, 2\] x width.*Begin with"):
        adapted(swapped=True)(input_ids=torch.ones(4, 4, dtype=torch.long))


def test_a_square_first_batch_is_preceded_by_one_small_forward():
    model, ids = adapted(swapped=False), torch.arange(16).view(4, 4)
    block = model.base_model.model.block
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model(input_ids=ids)
    assert torch.equal(torch.rand(3), expected)  # the small forward draws no random number of the caller's
    assert block.runs == 2
    model(input_ids=ids)
    assert block.runs == 3
    assert changed(model, ids) == [[row, 0] for row in range(4)]


def test_a_batch_that_is_not_square_shows_the_layout_by_itself():
    model = adapted(swapped=False)
    block = model.base_model.model.block
    model(input_ids=torch.ones(2, 4, dtype=torch.long))
    model(input_ids=torch.ones(4, 4, dtype=torch.long))
    assert block.runs == 2
    with pytest.raises(ValueError, match="does not hold one state for each of the batch's 2 x 4"):
        adapted(swapped=True)(input_ids=torch.ones(2, 4, dtype=torch.long))


def test_a_failed_call_shows_no_layout():
    model = adapted(swapped=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="does not hold one state"):
            model(input_ids=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="may return"):
        model(input_ids=torch.ones(4, 4, dtype=torch.long))


def test_a_model_that_is_copied_still_asks():
    model = copy.deepcopy(adapted(swapped=True))
    with pytest.raises(ValueError, match="may return"):
        model(input_ids=torch.ones(4, 4, dtype=torch.long))


def test_a_model_that_can_not_be_probed_is_refused():
    model = adapted(swapped=False)
    model.base_model.model.embedding.weight = nn.Parameter(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="index out of range.*Begin with a batch of another shape"):
        model(input_ids=torch.ones(2, 2, dtype=torch.long))


def test_xlnet_edits_the_tokens_of_a_square_batch():
    torch.manual_seed(0)
    config = t.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64)
    config_of_adapter = ReftConfig(r=2, positions="f1", layers_to_transform=[1], task_type="CAUSAL_LM")
    model = get_peft_model(t.XLNetLMHeadModel(config).eval(), config_of_adapter).eval()
    randomize(model)
    ids = torch.randint(5, 99, (6, 6))
    with torch.no_grad():
        edited = model(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    assert ((edited - plain).abs().amax(-1) > 1e-4).nonzero().tolist() == [[row, 0] for row in range(6)]


@pytest.mark.parametrize("tokens", [6, 7])
def test_reformer_edits_the_callers_tokens_before_its_padding(tokens):
    def make():
        return tiny(t.ReformerConfig, t.ReformerModelWithLMHead)

    with pytest.raises(ValueError, match="reversible blocks") as refusal:
        get_peft_model(make(), ReftConfig(r=2, positions="l1"))
    target = re.search(r"target_modules='(.*?)'", str(refusal.value).replace("\\\\", "\\"))[1]
    with pytest.raises(ValueError, match="reversible blocks"):
        get_peft_model(make(), ReftConfig(r=2, positions="l1", target_modules=r".*feed_forward\.output"))
    model = get_peft_model(make(), ReftConfig(r=2, positions="l1", target_modules=target)).eval()
    randomize(model)
    seen = []
    model.base_model.model.reformer.embeddings.register_forward_hook(lambda *a: seen.append(a[2].clone()))
    ids = torch.arange(5, 5 + 2 * tokens).view(2, tokens)
    with torch.no_grad():
        model(input_ids=ids)
        with model.disable_adapter():
            model(input_ids=ids)
    assert seen[0].shape[1] == 2 * -(-tokens // 2)
    assert ((seen[0] - seen[1]).abs().amax(-1) > 1e-4).nonzero().tolist() == [[0, tokens - 1], [1, tokens - 1]]


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_text_stack_is_found_whatever_the_depth_of_the_vision_tower(depth):
    vision = t.CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=depth, num_attention_heads=4)
    text = t.LlamaConfig(**GROUPED)
    model = t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=text))
    get_peft_model(model, ReftConfig(r=2))
    edited = [name for name, module in model.named_modules() if isinstance(module, ReftLayer)]
    assert edited == [f"model.language_model.layers.{index}" for index in range(3)]


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_a_class_with_the_decoder_only_is_as_deep_as_the_decoder(depth):
    config = t.BartConfig(vocab_size=97, d_model=32, encoder_layers=3, decoder_layers=depth, decoder_attention_heads=4)
    model = t.BartForCausalLM(config)
    get_peft_model(model, ReftConfig(r=2))
    assert sum(isinstance(module, ReftLayer) for module in model.modules()) == depth


def test_streams_are_edited_as_documented():
    model = get_peft_model(tiny(t.DeepseekV4Config, t.DeepseekV4ForCausalLM), ReftConfig(r=2))
    assert {layer.reft_R["default"].shape[-1] for layer in model.modules() if isinstance(layer, ReftLayer)} == {128}
    model = get_peft_model(tiny(t.Gemma3nTextConfig, t.Gemma3nForCausalLM), ReftConfig(r=2))
    assert {layer.reft_R["default"].shape[-1] for layer in model.modules() if isinstance(layer, ReftLayer)} == {32}


def test_musicgen_is_refused_unless_all_is_edited():
    def make():
        return tiny(t.MusicgenConfig, t.MusicgenForCausalLM)

    with pytest.raises(ValueError, match="codebooks.*Set positions='all'"):
        get_peft_model(make(), ReftConfig(r=2, positions="f1"))
    base, ids = make(), torch.arange(24).view(8, 3)  # 2 examples of 4 codebooks
    plain = base(input_ids=ids).logits
    model = get_peft_model(base, ReftConfig(r=2, positions="all")).eval()
    assert torch.equal(model(input_ids=ids).logits, plain)
    randomize(model)
    assert (model(input_ids=ids).logits - plain).abs().max() > 1e-2


def test_a_common_layer_has_no_layout():
    """The hot path of [rows, tokens, width] stays as it is."""
    model = get_peft_model(build("llama"), ReftConfig(r=2, positions="f1"))
    assert all(layer.layout is None for layer in model.modules() if isinstance(layer, ReftLayer))
    context = model.base_model._context
    model(**prompts(9, 4))
    assert not context._unconfirmed
