"""ReFT adapters in vLLM, on its CPU build: every answer is compared with `generate` of the PEFT model, in float32. An
answer is the greedy tokens with the log-probability of each."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from served import BROKEN, Reference, ask, break_adapter, prompts_of, save_adapter, save_lora, save_model, start
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest

from peft_reft.integrations.vllm import plugin
from peft_reft.integrations.vllm.adapters import Adapter
from peft_reft.integrations.vllm.plans import Plan


pytestmark = pytest.mark.slow

LENGTHS = [1, 2, 5, 13, 14, 20, 32, 33, 64, 65, 100, 130, 180, 294]
TOKENS = 5
TOLERANCE = 2e-4
TEMPLATE = [7, 8]
# name -> fields of the adapter's config
ADAPTERS: dict[str, dict[str, Any]] = {
    "loreft": {},
    "shared": {"share_weights": True, "positions": "f3+l2", "r": 8},
    "last": {"positions": "l1", "layers_to_transform": [1]},
    "noreft": {"intervention": "noreft", "positions": "f2"},
    "direft": {"intervention": "direft", "positions": "l7"},
    "nodireft": {"intervention": "nodireft", "act_fn": "gelu"},
    "act": {"act_fn": "sigmoid", "add_bias": False},
    "consreft": {"intervention": "consreft"},
    "lobireft": {"intervention": "lobireft", "positions": "f1+l1"},
    "all": {"positions": "all"},
    "template": {"response_template": TEMPLATE},
    "every": {"response_template": TEMPLATE, "prompt_boundary": "every", "positions": "f2+l2"},
    "subspaces": {"subspaces": {"style": 1, "facts": 3}},
    "subspaces-all": {"subspaces": {"style": 1, "facts": 3}, "positions": "all"},
    "scaled": {"scale": -0.5, "positions": "f3+l3"},
}


class Server:
    """A model with its adapters, in an engine of vLLM and in PEFT."""

    def __init__(
        self, folder: Path, adapters: dict[str, dict[str, Any]], family: str = "Llama", **settings: Any
    ) -> None:
        engine_settings = settings.pop("engine", {})
        self.base = save_model(folder / "base", family, **settings)
        self.folders = {name: save_adapter(self.base, folder / name, **fields) for name, fields in adapters.items()}
        self.reference = Reference(self.base, self.folders)
        self.engine = start(self.base, **engine_settings)
        self.requests = {name: LoRARequest(name, n + 1, path) for n, (name, path) in enumerate(self.folders.items())}

    def check(self, asked: list[tuple[list[int], str | None]], tokens: int = TOKENS, **extra: Any) -> None:
        """Ask all in one batch, and compare with the PEFT model."""
        requests = [(prompt, self.requests[name] if name else None) for prompt, name in asked]
        for (prompt, name), (ids, logp) in zip(asked, ask(self.engine, requests, tokens, **extra)):
            expected_ids, expected = self.reference.answer(prompt, name, tokens, **(extra if name else {}))
            worst = max(abs(a - b) for a, b in zip(logp, expected))
            assert ids == expected_ids and worst < TOLERANCE, (name, len(prompt), worst, ids, expected_ids)

    def changes(self, prompt: list[int], name: str) -> bool:
        """Whether an adapter changes an answer at all: the comparison would pass without it otherwise."""
        (ids, logp), (base_ids, base_logp) = (self.reference.answer(prompt, n, TOKENS) for n in (name, None))
        return ids != base_ids or max(abs(a - b) for a, b in zip(logp, base_logp)) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("served"), ADAPTERS, engine={"max_cpu_loras": 6})


@pytest.fixture(autouse=True)
def empty_prefix_cache(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").engine.reset_prefix_cache()


# -- one batch, twice: the second round reads the prefix cache -------------------------------------------------------


def test_a_batch_of_base_and_adapter_twice(server: Server) -> None:
    asked = [(prompt, name) for prompt in prompts_of(LENGTHS) for name in (None, "loreft")]
    assert len(asked) == 28 and server.changes(asked[-1][0], "loreft")
    for _ in range(2):
        server.check(asked)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in ("template", "every")])
def test_each_kind_of_adapter(server: Server, name: str) -> None:
    prompts = prompts_of([3, 40, 101])
    assert server.changes(prompts[1], name)
    for _ in range(2):
        server.check([(prompt, which) for prompt in prompts for which in (name, None)], tokens=12)


@pytest.mark.parametrize("name", ["template", "every"])
def test_prompts_by_the_response_template(server: Server, name: str) -> None:
    one, two, three = prompts_of([30, 31, 40])
    turns = [*one, *TEMPLATE, 9, 10, 3, *two, *TEMPLATE, 11, 12, 3, *three, *TEMPLATE]
    for prompt in (turns, [*one, *TEMPLATE, *two], one):
        assert server.changes(prompt, name)
        for _ in range(2):
            server.check([(prompt, name), (prompt, None)])


def test_turns_of_a_chat_read_the_cache_of_the_turn_before(server: Server) -> None:
    chats = {name: prompts_of([60])[0] for name in ("loreft", "last", "every", "all")}
    for turn in range(3):
        server.check(list(zip(chats.values(), chats.keys())))
        for name, chat in chats.items():
            chat += [*server.reference.answer(chat, name, 8)[0], *prompts_of([21], seed=turn)[0]]


def test_requests_choose_subspaces(server: Server) -> None:
    (prompt,) = prompts_of([70])
    for names in ("style", "facts", "style+facts"):
        for _ in range(2):
            server.check([(prompt, "subspaces"), (prompt, "subspaces-all")], tokens=8, subspaces=names)
    server.check([(prompt, "subspaces")])


def test_requests_choose_a_strength(server: Server) -> None:
    (prompt,) = prompts_of([70])
    one, zero = (server.reference.answer(prompt, "loreft", TOKENS, scale=scale) for scale in (1, 0))
    assert zero == server.reference.answer(prompt, None, TOKENS) and one[1] != zero[1]
    for scale in (0.5, 1, -2.0, 0, 0.5):
        server.check([(prompt, name) for name in ("loreft", "all", "subspaces", "scaled")], tokens=8, scale=scale)
    asked = [(prompt, server.requests["loreft"])]
    assert ask(server.engine, asked, TOKENS, scale=0) == ask(server.engine, [(prompt, None)], TOKENS)
    assert ask(server.engine, asked, TOKENS, scale=1) == ask(server.engine, asked, TOKENS)


def test_more_adapters_than_slots(server: Server) -> None:
    prompts = prompts_of([17, 50])
    server.check([(prompt, name) for name in ADAPTERS for prompt in prompts])


def test_prompt_log_probabilities(server: Server) -> None:
    (prompt,) = prompts_of([90])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    for name in ("loreft", "all"):
        output = server.engine.generate({"prompt_token_ids": prompt}, params, lora_request=server.requests[name])[0]
        given = [step[index].logprob for step, index in zip(output.prompt_logprobs[1:], prompt[1:])]
        with torch.no_grad():
            logits = server.reference.adapted[name](
                input_ids=torch.tensor([prompt]), prompt_lengths=torch.tensor([len(prompt)])
            ).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert (torch.tensor(given) - expected).abs().max() < TOLERANCE


def test_several_answers_to_one_prompt(server: Server) -> None:
    (prompt,) = prompts_of([50])
    params = SamplingParams(n=3, seed=1, temperature=1e-5, max_tokens=3, ignore_eos=True, detokenize=False)
    output = server.engine.generate({"prompt_token_ids": prompt}, params, lora_request=server.requests["loreft"])[0]
    expected, _ = server.reference.answer(prompt, "loreft", 3)
    assert [list(one.token_ids) for one in output.outputs] == [expected] * 3


# -- LoRA adapters beside ReFT adapters, removing ---------------------------------------------------------------------


def test_base_reft_and_lora_in_one_batch(server: Server, tmp_path: Path) -> None:
    engine = server.engine.llm_engine
    for number in engine.list_loras():
        engine.remove_lora(number)
    folder = save_lora(server.base, tmp_path / "lora")
    server.reference.adapted["lora"] = Reference(server.base, {"lora": folder}).adapted["lora"]
    server.requests["lora"] = LoRARequest("lora", 400, folder)
    prompts = prompts_of([2, 40, 101, 130])
    assert server.changes(prompts[1], "lora")
    # vLLM on a CPU gives tokens without a LoRA that of the last slot. Three of four slots are used: it stays empty.
    server.check([(prompts[0], "lora")])
    for _ in range(2):
        server.check([(prompt, name) for prompt in prompts for name in ("lora", None, "loreft", "all")])
    engine.remove_lora(400)
    server.check([(prompt, name) for prompt in prompts for name in (None, "loreft")])


def held(folder: Path | str) -> list[Adapter]:
    """The adapters in memory that were read from a folder: the frontend's and the worker's."""
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, Adapter) and one.folder == str(folder)]


def test_an_adapter_that_is_removed_leaves_the_memory(server: Server, tmp_path: Path) -> None:
    folder = save_adapter(server.base, tmp_path / "removed", seed=3)
    prompts = prompts_of([40, 90])
    for number in (301, 302):
        ask(server.engine, [(prompt, LoRARequest("removed", number, folder)) for prompt in prompts], 1)
        assert len(held(folder)) == 2
        weights = [weakref.ref(t) for one in held(folder) for of in one.weights.values() for t in of.values()]
        assert weights and server.engine.llm_engine.remove_lora(number)
        server.check([(prompts[0], None)])
        assert not held(folder) and not any(weight() is not None for weight in weights)


def test_requests_keep_an_adapter_that_is_removed(server: Server, tmp_path: Path) -> None:
    folder = save_adapter(server.base, tmp_path / "removed", seed=4)
    (prompt,) = prompts_of([60])
    engine = server.engine.llm_engine
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    for name in ("a", "b"):
        engine.add_request(
            name, {"prompt_token_ids": prompt}, params, lora_request=LoRARequest("removed", 303, folder)
        )
    engine.remove_lora(303)
    shutil.rmtree(folder)
    assert held(folder)
    answers = []
    while engine.has_unfinished_requests():
        answers += [list(one.outputs[0].token_ids) for one in engine.step() if one.finished]
    engine.remove_lora(304)  # any later call
    server.check([(prompt, None)])
    assert not held(folder)
    again = save_adapter(server.base, tmp_path / "again", seed=4)
    assert answers == [Reference(server.base, {"x": again}).answer(prompt, "x", TOKENS)[0]] * 2


def test_a_lora_does_not_get_the_number_of_a_removed_adapter_that_requests_use(server: Server, tmp_path: Path) -> None:
    folder, lora = save_adapter(server.base, tmp_path / "removed", seed=8), save_lora(server.base, tmp_path / "lora")
    engine, (prompt,) = server.engine.llm_engine, prompts_of([60])
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    engine.add_request("a", {"prompt_token_ids": prompt}, params, lora_request=LoRARequest("removed", 306, folder))
    engine.remove_lora(306)
    with pytest.raises(ValueError, match="lora_int_id 306 of 'lora' is that of a ReFT adapter"):
        engine.add_lora(LoRARequest("lora", 306, lora))
    answers = []
    while engine.has_unfinished_requests():
        answers += [list(one.outputs[0].token_ids) for one in engine.step() if one.finished]
    assert answers == [Reference(server.base, {"x": folder}).answer(prompt, "x", TOKENS)[0]]
    assert engine.add_lora(LoRARequest("lora", 306, lora))  # nobody uses the adapter any more
    ((ids, _),) = ask(server.engine, [(prompt, LoRARequest("lora", 306, lora))], TOKENS)
    assert ids == Reference(server.base, {"x": lora}).answer(prompt, "x", TOKENS)[0]
    engine.remove_lora(306)


def test_a_request_that_was_not_made_for_the_adapter_fails_alone(server: Server) -> None:
    """As from a frontend without the plugin, or one that has planned for another content."""
    (prompt,) = prompts_of([20])
    server.check([(prompt, "loreft")])
    core = server.engine.llm_engine.engine_core.engine_core
    for extra in (None, Plan("other", [[0, 0]]).carried_by({})):
        params = SamplingParams(max_tokens=1, extra_args=extra)
        request = SimpleNamespace(request_id="r", sampling_params=params, lora_request=server.requests["loreft"])
        with pytest.raises(ValueError, match="The request r to 'loreft' was not made for the adapter"):
            core.preprocess_add_request(request)


def test_what_is_loaded_is_not_looked_for_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path, whose folder is gone when vLLM's own cache has dropped the adapter and asks for it anew."""
    monkeypatch.chdir(tmp_path)
    folder, (prompt,) = save_adapter(server.base, tmp_path / "moved", seed=7), prompts_of([60])
    asked = [(prompt, LoRARequest("moved", 307, "moved"))]
    first = ask(server.engine, asked, TOKENS)
    assert first[0][0] == Reference(server.base, {"x": folder}).answer(prompt, "x", TOKENS)[0]
    shutil.rmtree(folder)
    for name in [*ADAPTERS][:8]:  # more than the cache holds
        server.check([(prompt, name)], 1)
    server.engine.reset_prefix_cache()
    assert ask(server.engine, asked, TOKENS)[0][0] == first[0][0]
    server.engine.llm_engine.remove_lora(307)


@pytest.mark.parametrize("reading", range(2, 8))
def test_a_folder_that_is_written_to_while_it_is_loaded_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: int
) -> None:
    """The frontend, the core and the worker each read the folder. Whichever reads something else, it is refused."""
    from peft_reft.integrations.vllm import adapters

    folder, (prompt,) = save_adapter(server.base, tmp_path / "torn", seed=1), prompts_of([20])
    calls = []

    def hashed(path: str, original: Any = adapters.fingerprint) -> str:
        calls.append(path)
        if len(calls) == reading:
            save_adapter(server.base, tmp_path / "torn", seed=2)
        return original(path)

    monkeypatch.setattr(adapters, "fingerprint", hashed)
    monkeypatch.setattr(plugin, "fingerprint", hashed)
    torn = LoRARequest("torn", 308, folder)
    with pytest.raises(ValueError, match="torn' was written to while it was loaded"):
        ask(server.engine, [(prompt, torn)], 1)
    assert len(calls) >= reading
    server.check([(prompt, "loreft"), (prompt, None)])
    ((ids, _),) = ask(server.engine, [(prompt, LoRARequest("torn", 308, folder, load_inplace=True))], TOKENS)
    assert ids == Reference(server.base, {"x": folder}).answer(prompt, "x", TOKENS)[0]
    server.engine.llm_engine.remove_lora(308)


def test_a_removed_adapter_is_not_replaced_while_requests_use_it(server: Server, tmp_path: Path) -> None:
    folder, (prompt,) = save_adapter(server.base, tmp_path / "removed", seed=5), prompts_of([60])
    engine, number = server.engine.llm_engine, LoRARequest("removed", 305, str(tmp_path / "removed"))
    expected = Reference(server.base, {"x": folder}).answer(prompt, "x", TOKENS)[0]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    engine.add_request("first", {"prompt_token_ids": prompt}, params, lora_request=number)
    engine.remove_lora(305)
    engine.add_request("again", {"prompt_token_ids": prompt}, params, lora_request=number)  # the folder is as it was
    engine.remove_lora(305)
    save_adapter(server.base, tmp_path / "removed", seed=6)
    with pytest.raises(ValueError, match="can't be replaced while 2 requests use it"):
        engine.add_request("changed", {"prompt_token_ids": prompt}, params, lora_request=number)
    answers = []
    while engine.has_unfinished_requests():
        answers += [list(one.outputs[0].token_ids) for one in engine.step() if one.finished]
    assert answers == [expected] * 2
    ((ids, _),) = ask(server.engine, [(prompt, number)], TOKENS)
    assert ids == Reference(server.base, {"x": folder}).answer(prompt, "x", TOKENS)[0] != expected
    engine.remove_lora(305)


def test_adapters_do_not_share_a_number(server: Server, tmp_path: Path) -> None:
    lora, (prompt,) = save_lora(server.base, tmp_path / "lora"), prompts_of([40])
    ask(server.engine, [(prompt, LoRARequest("lora", 500, lora))], 1)
    for number, folder in (
        (500, server.folders["loreft"]),  # of a LoRA adapter
        (server.requests["loreft"].lora_int_id, server.folders["last"]),
        (server.requests["loreft"].lora_int_id, lora),
    ):
        server.check([(prompt, "loreft")])
        with pytest.raises(ValueError, match=f"lora_int_id {number} .* number of its own"):
            ask(server.engine, [(prompt, LoRARequest("twice", number, folder))], 1)
    server.engine.llm_engine.remove_lora(500)
    server.check([(prompt, "loreft"), (prompt, None)])


# -- the prefix cache ------------------------------------------------------------------------------------------------


def cached(server: Server, prompt: list[int], name: str | None) -> int:
    """How many tokens of a prompt are read from the prefix cache."""
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    adapter = server.requests[name] if name else None
    return server.engine.generate({"prompt_token_ids": prompt}, params, lora_request=adapter)[0].num_cached_tokens


def test_blocks_are_shared_wherever_nothing_differs(server: Server) -> None:
    (prompt,) = prompts_of([100])
    longer = [*prompt, *prompts_of([40], seed=5)[0]]
    assert cached(server, prompt, None) == 0
    assert cached(server, prompt, "last") == 96  # its one edited token is behind the last whole block
    assert cached(server, prompt, "direft") == 64 and cached(server, prompt, "loreft") == 0
    assert cached(server, prompt, "direft") == 96
    assert cached(server, longer, "direft") == 96  # of the base: the adapter edits this prompt's last 7 tokens alone
    server.engine.reset_prefix_cache()
    cached(server, prompt, "direft")
    assert cached(server, prompt, None) == 64  # not the block in which the adapter edited tokens
    server.engine.reset_prefix_cache()
    cached(server, prompt, "direft")
    assert cached(server, longer, "direft") == 64  # nor does the adapter itself, whose last tokens are others here


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_adapter_is_refused_and_the_engine_goes_on(server: Server, tmp_path: Path, what: str) -> None:
    folder, words = break_adapter(server.base, server.folders["loreft"], tmp_path, what)
    bad = LoRARequest("bad", 100 + BROKEN.index(what), str(folder))
    prompts = prompts_of([40])
    with pytest.raises(ValueError, match=words):
        ask(server.engine, [(prompts[0], bad)], 1)
    with pytest.raises((ValueError, VLLMClientError), match=words):
        server.engine.llm_engine.add_lora(bad)
    server.check([(prompts[0], "loreft"), (prompts[0], None)])


def test_a_folder_that_changed_is_loaded_anew_only_when_asked(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "changing"
    save_adapter(server.base, folder, seed=1)
    (prompt,) = prompts_of([100])
    name = LoRARequest("changing", 200, str(folder))
    first = ask(server.engine, [(prompt, name)], TOKENS)
    save_adapter(server.base, folder, seed=2)
    with pytest.raises(ValueError, match="load_inplace"):
        ask(server.engine, [(prompt, name)], TOKENS)
    server.engine.llm_engine.add_lora(LoRARequest("changing", 200, str(folder), load_inplace=True))
    (second,) = ask(server.engine, [(prompt, name)], TOKENS)
    expected_ids, expected = Reference(server.base, {"x": str(folder)}).answer(prompt, "x", TOKENS)
    assert second[0] == expected_ids and second != first[0]
    assert max(abs(a - b) for a, b in zip(second[1], expected)) < TOLERANCE


def test_an_adapter_that_can_not_be_replaced_stays_as_it_was(server: Server, tmp_path: Path) -> None:
    engine, folder = server.engine.llm_engine, save_adapter(server.base, tmp_path / "kept", seed=8)
    (prompt,) = prompts_of([60])
    expected = Reference(server.base, {"x": folder}).answer(prompt, "x", TOKENS)[0]
    again = LoRARequest("kept", 201, folder, load_inplace=True)
    ask(server.engine, [(prompt, LoRARequest("kept", 201, folder))], 1)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    engine.add_request("one", {"prompt_token_ids": prompt}, params, lora_request=LoRARequest("kept", 201, folder))
    save_adapter(server.base, tmp_path / "kept", seed=9)
    with pytest.raises(ValueError, match="1 requests use it"):
        engine.add_lora(again)
    with pytest.raises(ValueError, match="has changed"):
        engine.add_request("two", {"prompt_token_ids": prompt}, params, lora_request=LoRARequest("kept", 201, folder))
    answers = []
    while engine.has_unfinished_requests():
        answers += [list(one.outputs[0].token_ids) for one in engine.step() if one.finished]
    assert answers == [expected]
    ((ids, _),) = ask(server.engine, [(prompt, again)], TOKENS)  # a request may ask for it, too
    assert ids == Reference(server.base, {"x": folder}).answer(prompt, "x", TOKENS)[0] != expected
    engine.remove_lora(201)


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("subspaces", {"subspaces": "tone"}, "tone"),
        ("loreft", {"subspaces": "style"}, "no subspaces"),
        ("loreft", {"scale": "half"}, "scale='half' is no strength"),
        ("loreft", {"scale": float("nan")}, "scale=nan is no strength"),
        ("loreft", {"scale": 1e39}, "scale=1e.39 is no strength .* may be -100 to 100"),
        ("scaled", {"scale": 250}, "scale=250 beside the adapter's own -0.5 is no strength"),
        ("loreft", {"peft_reft": ["x", None, None]}, "plugin's own"),
        (None, {"peft_reft": ["x", None, None]}, "plugin's own"),
    ],
)
def test_bad_extra_arguments_are_refused(server: Server, name: str | None, extra: dict[str, Any], words: str) -> None:
    (prompt,) = prompts_of([20])
    with pytest.raises(ValueError, match=words):
        ask(server.engine, [(prompt, server.requests[name] if name else None)], 1, **extra)
    server.check([(prompt, name)])


def test_beam_search_is_refused(server: Server) -> None:
    from vllm.sampling_params import BeamSearchParams

    (prompt,) = prompts_of([20])
    with pytest.raises(ValueError, match="beam search"):
        server.engine.beam_search(
            [{"prompt_token_ids": prompt}],
            BeamSearchParams(beam_width=2, max_tokens=2),
            lora_request=server.requests["loreft"],
        )


# -- nothing to edit costs nothing -----------------------------------------------------------------------------------


def test_layers_are_as_without_the_plugin_in_steps_with_nothing_to_edit(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_reft.integrations.vllm.worker import EditedModel

    seen = []
    finish = EditedModel.finish

    def noted(self: EditedModel) -> None:
        finish(self)
        seen.append([type(block) is not self.classes[name][0] for name, block in self.blocks.items()])

    monkeypatch.setattr(EditedModel, "finish", noted)
    ask(server.engine, [(prompts_of([40])[0], server.requests["last"])], 4)
    assert seen == [[False, True, False], *[[False] * 3] * 3]  # the prefill, with an adapter of layer 1; decode steps
