"""What bad settings get: an error that names the field, the value and the way out, and a model left alone."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from models import build, prompts
from peft import PeftModel, get_peft_model

from peft_reft import ReftConfig, ReftLayer


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 0}, r"r=0 .*at least 1.*r=8"),
        ({"r": 2.5}, r"r=2.5"),
        ({"r": True}, r"r=True"),
        ({"intervention": "lora"}, r"intervention='lora'.*one of loreft, noreft.*'loreft'"),
        ({"positions": "f7-l7"}, r"positions='f7-l7' does not parse.*'f7\+l7'"),
        ({"share_weights": "yes"}, r"share_weights='yes'.*True or False"),
        ({"dropout": 1.0}, r"dropout=1.0"),
        ({"dropout": "0.1"}, r"dropout='0.1'"),
        ({"act_fn": "gleu"}, r"act_fn='gleu'.*gelu"),
        ({"act_fn": "gelu", "intervention": "lobireft"}, r"act_fn='gelu'.*lobireft has no activation"),
        ({"add_bias": False, "intervention": "consreft"}, r"add_bias=False.*source of consreft is b"),
        ({"init_weights": "gaussian"}, r"init_weights='gaussian'.*'pyreft'"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform=\[-1\].*from 0"),
        ({"layers_to_transform": []}, r"layers_to_transform=\[\]"),
        ({"layers_to_transform": "all"}, r"layers_to_transform='all'"),
        ({"layers_pattern": "layers"}, r"layers_pattern='layers'.*layers_to_transform"),
        ({"target_modules": []}, r"target_modules=\[\]"),
        ({"target_modules": [1]}, r"target_modules=\[1\]"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head'"),
        ({"task_type": "CHAT"}, r"Invalid task type: 'CHAT'"),
        ({"response_template": ""}, r"response_template=''.*or its token ids"),
        ({"response_template": []}, r"response_template=\[\]"),
        ({"response_template": [5, -1]}, r"response_template=\[5, -1\]"),
        ({"response_template": ["a"]}, r"response_template=\['a'\].*assistant"),
        (
            {"response_template": "A:", "task_type": "SEQ_CLS"},
            r"response_template='A:'.*task_type='SEQ_CLS'.*no answers",
        ),
        ({"prompt_boundary": "last"}, r"prompt_boundary='last'.*'first' or 'every'"),
        ({"subspaces": {}}, r"subspaces=\{\}"),
        ({"subspaces": ["style"]}, r"subspaces=\['style'\]"),
        ({"subspaces": {"a+b": 8}}, r"subspaces=\{'a\+b': 8\}.*without '\+'"),
        ({"subspaces": {"a": 4, "b": 3}}, r"subspaces=\{'a': 4, 'b': 3\}.*add up to r=8"),
        ({"subspaces": {"a": 8, "b": 0}}, r"subspaces=.*at least 1"),
    ],
    ids=str,
)
def test_wrong_values_fail_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**settings)


def test_turns_that_generate_can_not_see():
    with pytest.warns(
        UserWarning, match="'every' without response_template.*takes a whole conversation for one prompt"
    ):
        ReftConfig(prompt_boundary="every", response_template=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        searching = ReftConfig(prompt_boundary="every")
        ReftConfig(prompt_boundary="every", response_template="A:")
        ReftConfig(prompt_boundary="every", positions="all")
    with pytest.warns(UserWarning, match="'every' without response_template"):
        get_peft_model(build("llama"), searching)  # which has no tokenizer to find one by


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 33}, r"r=33 is above the width 32 of 'model.layers.0'.*r <= 32"),
        ({"r": 20, "target_modules": ["k_proj"]}, r"r=20 is above the width 16 of 'model.layers.0.self_attn.k_proj'"),
        ({"layers_to_transform": [1, 3, 7]}, r"don't exist: \[3, 7\].*layers 0 to 2"),
        (
            {"target_modules": ["nothing"]},
            r"Target modules \['nothing'\] not found in the base model.*no module of LlamaForCausalLM",
        ),
        ({"exclude_modules": ".*"}, r"exclude_modules='\.\*' they match no module"),
        (
            {"target_modules": ["mlp", "down_proj"]},
            r"'model.layers.0.mlp.down_proj', which lies inside 'model.layers.0.mlp'",
        ),
        ({"target_modules": ["embed_tokens"], "layers_to_transform": [0]}, r"don't exist: \[0\].*without an index"),
        ({"width": 64}, r"width=64: this adapter was made for.*has width 32"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_leaves_it_alone(settings, message):
    base, batch = build("llama"), prompts(6)
    before = base(**batch).logits
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, ReftConfig(**{"r": 4, **settings}))
    assert not any(isinstance(module, ReftLayer) for module in base.modules())
    assert not base._forward_pre_hooks and "generate" not in base.__dict__
    assert torch.equal(base(**batch).logits, before)

    model = get_peft_model(base, ReftConfig(r=4))  # and as a second adapter
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=f"{message}|lies inside"):
        model.add_adapter("other", ReftConfig(**{"r": 4, **settings}))
    assert list(model.peft_config) == ["default"] and list(model.state_dict()) == names


def test_a_second_adapter_inside_the_first_is_refused():
    model = get_peft_model(build("llama"), ReftConfig(r=4))
    with pytest.raises(ValueError, match="lies inside 'model.layers.0', itself edited"):
        model.add_adapter("other", ReftConfig(r=4, target_modules=["mlp"]))


def test_an_adapter_saved_for_another_width(tmp_path):
    get_peft_model(build("llama"), ReftConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["width"] == 32
    other = build("llama").config
    other.hidden_size, other.head_dim = 48, 12
    base = type(build("llama"))(other)
    with pytest.raises(ValueError, match=r"width=32: this adapter was made for modules of width 32.*has width 48"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, ReftLayer) for module in base.modules())


def test_models_whose_stack_can_not_be_told():
    with pytest.raises(ValueError, match="no transformers model.*target_modules"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), ReftConfig(r=2))
    base = build("llama")
    base.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"main stack of LlamaForCausalLM can't be told.*model.layers \(3\).*=5"):
        get_peft_model(base, ReftConfig(r=2))


def model_and_batch(**settings):
    settings = {"r": 4, "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(build("llama"), ReftConfig(**settings)).train(), prompts(8, 5)


def test_a_batch_with_no_prompt_tokens():
    model, batch = model_and_batch()
    with pytest.raises(ValueError, match="no prompt tokens to edit.*train_on_inputs.*-100.*prompt_lengths.*'all'"):
        model(**batch, labels=batch["input_ids"])
    with pytest.raises(ValueError, match="no prompt tokens to edit.*prompt_lengths is 0"):
        model(**batch, prompt_lengths=torch.tensor([0, 0]))
    everywhere, batch = model_and_batch(positions="all")
    everywhere(**batch, labels=batch["input_ids"]).loss.backward()


def test_a_training_batch_that_does_not_say_where_its_prompts_end():
    model, batch = model_and_batch()
    with pytest.raises(ValueError, match=r"without labels.*prompt_lengths \[batch\].*positions='all'"):
        model(**batch)
    model(**batch, prompt_lengths=torch.tensor([3, 2])).logits.sum().backward()


def test_a_part_of_the_model_called_by_itself():
    model, batch = model_and_batch()
    with pytest.raises(RuntimeError, match="'model.layers.0' ran without a Selection.*PeftModel"):
        model.base_model.model.model(**batch)


def test_masks_that_do_not_say_what_is_padding():
    model, batch = model_and_batch()
    batch["attention_mask"] = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"attention_mask is of shape \[2, 1, 8, 8\].*intervention_mask"):
        model.eval()(**batch)


def test_a_module_that_does_not_work_token_by_token():
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(97, 16)
            self.head = torch.nn.Linear(16, 16)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids).mean(dim=1))

    model = get_peft_model(Pooled(), ReftConfig(r=4, positions="f1", target_modules=["head"]))
    with pytest.raises(ValueError, match=r"'head' returns shape \[2, 16\].*2 x 8 tokens.*positions='all'"):
        model.eval()(prompts(8, 5)["input_ids"])


def test_errors_leave_nothing_behind():
    model, batch = model_and_batch()
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
    with pytest.raises(ValueError):
        model.train()(**batch)
    with pytest.raises(ValueError):
        model.generate(**batch, prompt_lengths=torch.tensor([1, 2, 3]))
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, before)


@pytest.mark.parametrize(
    "module", [torch.nn.MultiheadAttention(8, 2), torch.nn.Conv1d(4, 8, 1), torch.nn.Conv2d(4, 8, 1)]
)
def test_modules_whose_output_does_not_end_in_hidden_states_are_refused(module):
    net = torch.nn.ModuleDict({"part": module})
    net.forward = lambda x: net["part"](x)
    with pytest.raises(ValueError, match=r"The width of the output of 'part' \(.*\) can't be told"):
        get_peft_model(net, ReftConfig(positions="all", target_modules=["part"]))
    assert net["part"] is module
