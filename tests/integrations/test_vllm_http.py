"""ReFT adapters over HTTP: vLLM's server as a process of its own, asked by concurrent clients. Every answer is
compared with `generate` of the PEFT model, in float32."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("vllm")

from models import CHAT_VOCAB, tokenizer
from served import BROKEN, Reference, break_adapter, prompts_of, save_adapter, save_lora, save_model


pytestmark = pytest.mark.slow

TOKENS = 5
TOLERANCE = 2e-4
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"positions": "f3+l2", "share_weights": True, "r": 8},
    "chat": {"response_template": "<|im_start|>assistant\n", "prompt_boundary": "every", "positions": "f2+l2"},
    "subspaces": {"subspaces": {"style": 1, "facts": 3}},
}


class Http:
    """vLLM's OpenAI server of a tiny model, and the PEFT model of each of its adapters."""

    def __init__(self, folder: Path) -> None:
        self.base = save_model(folder / "base", vocab_size=CHAT_VOCAB)
        self.tokenizer = tokenizer()
        self.tokenizer.save_pretrained(self.base)
        self.folders = {name: save_adapter(self.base, folder / name, **fields) for name, fields in ADAPTERS.items()}
        self.later = {name: save_adapter(self.base, folder / name, seed=seed) for name, seed in (("x", 5), ("y", 6))}
        self.lora = save_lora(self.base, folder / "lora")
        self.reference = Reference(self.base, {**self.folders, **self.later, "lora": self.lora})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.log = folder / "server.log"
        modules = [f"{name}={path}" for name, path in {**self.folders, "lora": self.lora}.items()]
        # vLLM on a CPU gives tokens without a LoRA that of the last slot. 8 slots: the last one stays empty.
        command = f"""{sys.executable} -m vllm.entrypoints.openai.api_server --model {self.base}
            --served-model-name base --host 127.0.0.1 --port {self.url.rsplit(":", 1)[1]} --dtype float32
            --enforce-eager --block-size 32 --max-model-len 400 --max-num-seqs 32 --generation-config vllm
            --kv-cache-memory-bytes {1 << 26} --enable-lora --max-loras 8 --max-lora-rank 8
            --lora-modules {" ".join(modules)}"""
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command.split(), stdout=log, stderr=log, env=environment)

    def wait(self) -> None:
        for _ in range(1200):
            try:
                self.get("health")
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, **fields: Any) -> tuple[int, Any]:
        """The status of an answer, and its content."""
        request = urllib.request.Request(
            f"{self.url}/v1/{path}", json.dumps(fields).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["error"]["message"]

    def complete(self, prompt: list[int], model: str | None, **fields: Any) -> tuple[list[int], list[float]]:
        status, answer = self.post(
            "completions",
            **{
                "model": model or "base",
                "prompt": prompt,
                "max_tokens": TOKENS,
                "temperature": 0,
                "logprobs": 1,
                "ignore_eos": True,
                "return_token_ids": True,
                **fields,
            },
        )
        assert status == 200, answer
        (choice,) = answer["choices"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def check(
        self, asked: list[tuple[list[int], str | None]], names: dict[str, str] | None = None, **fields: Any
    ) -> None:
        """Ask all at once, and compare with the PEFT model. `names`: adapters that the reference knows by others."""
        with ThreadPoolExecutor(16) as clients:
            answers = list(clients.map(lambda one: self.complete(*one, **fields), asked))
        given = fields.get("vllm_xargs", {})
        for (prompt, name), answer in zip(asked, answers):
            known = (names or {}).get(name, name) if name else None
            same(answer, self.reference.answer(prompt, known, TOKENS, **(given if name else {})), name)


def same(answer: tuple[list[int], list[float]], expected: tuple[list[int], list[float]], name: Any) -> None:
    worst = max(abs(a - b) for a, b in zip(answer[1], expected[1]))
    assert answer[0] == expected[0] and worst < TOLERANCE, (name, worst, answer, expected)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Http]:
    server = Http(tmp_path_factory.mktemp("http"))
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


def some_prompts(lengths: tuple[int, ...] = (2, 33, 70, 130), seed: int = 0) -> list[list[int]]:
    return prompts_of(list(lengths), seed)


def test_models_are_listed(http: Http) -> None:
    models = {model["id"]: model for model in http.get("v1/models")["data"]}
    assert {"base", "lora", *ADAPTERS} <= models.keys()
    assert models["one"]["parent"] == "base" and models["one"]["root"] == http.folders["one"]


def test_concurrent_clients_of_base_reft_and_lora(http: Http) -> None:
    names = (None, "one", "two", "lora")
    expected = {name: http.reference.answer(some_prompts()[2], name, TOKENS) for name in names}
    assert len({tuple(logp) for _, logp in expected.values()}) == 4  # each changes the answer
    for _ in range(2):  # the second round reads the prefix cache
        http.check([(prompt, name) for prompt in some_prompts() for name in names])


@pytest.mark.parametrize("name", [None, "one", "chat"])
def test_chat(http: Http, name: str | None) -> None:
    messages = [
        {"role": "user", "content": "What is the answer?"},
        {"role": "assistant", "content": "The answer is known."},
        {"role": "user", "content": "Name a colour."},
    ]
    prompt = http.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    status, answer = http.post(
        "chat/completions",
        model=name or "base",
        messages=messages,
        max_tokens=TOKENS,
        temperature=0,
        logprobs=True,
        ignore_eos=True,
        return_token_ids=True,
    )
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert answer["prompt_token_ids"] == prompt
    logp = [token["logprob"] for token in choice["logprobs"]["content"]]
    same((choice["token_ids"], logp), http.reference.answer(prompt, name, TOKENS), name)


def test_requests_choose_subspaces(http: Http) -> None:
    for names in ("style", "style+facts"):
        http.check([(some_prompts()[2], "subspaces")], vllm_xargs={"subspaces": names})


def test_requests_choose_a_strength(http: Http) -> None:
    for scale in (0.5, 0):
        http.check([(some_prompts()[2], "one")], vllm_xargs={"scale": scale})


def test_streamed_answers_are_the_same(http: Http) -> None:
    request = {"model": "one", "prompt": some_prompts()[2], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    data = json.dumps({**request, "stream": True, "return_token_ids": True}).encode()
    headers = {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{http.url}/v1/completions", data, headers)) as answer:
        lines = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: {")]
    ids = [token for line in lines for choice in json.loads(line)["choices"] for token in choice["token_ids"]]
    assert ids == http.reference.answer(some_prompts()[2], "one", TOKENS)[0]


# -- loading and unloading while the server runs ---------------------------------------------------------------------


def load(http: Http, name: str, path: str, **fields: Any) -> tuple[int, Any]:
    return http.post("load_lora_adapter", lora_name=name, lora_path=path, **fields)


def unload(http: Http, name: str) -> tuple[int, Any]:
    return http.post("unload_lora_adapter", lora_name=name)


def test_an_adapter_is_loaded_replaced_and_unloaded(http: Http, tmp_path: Path) -> None:
    (prompt,) = some_prompts((100,))
    folder = str(tmp_path / "changing")
    shutil.copytree(http.later["x"], folder)
    assert load(http, "new", folder)[0] == 200
    http.check([(prompt, "new"), (prompt, "one")], names={"new": "x"})
    status, message = load(http, "new", folder)
    assert status == 400 and "already been loaded" in message
    shutil.rmtree(folder)
    shutil.copytree(http.later["y"], folder)
    status, message = http.post("completions", model="new", prompt=prompt, max_tokens=1)
    assert status == 400 and "'new'" in message and "load_inplace" in message
    assert load(http, "new", folder, load_inplace=True)[0] == 200
    http.check([(prompt, "new"), (prompt, "one"), (prompt, "new")], names={"new": "y"})
    assert unload(http, "new")[0] == 200
    assert "new" not in [model["id"] for model in http.get("v1/models")["data"]]
    assert http.post("completions", model="new", prompt=prompt, max_tokens=1)[0] == 404
    assert unload(http, "new")[0] == 404
    assert load(http, "new", http.later["x"])[0] == 200  # the same name, another adapter
    http.check([(prompt, "new")], names={"new": "x"})
    assert unload(http, "new")[0] == 200


def test_adapters_come_and_go_while_others_are_asked(http: Http) -> None:
    prompts = some_prompts((20, 60, 90), seed=3)

    def come_and_go(number: int) -> None:
        which = "xy"[number % 2]
        assert load(http, f"new-{number}", http.later[which])[0] == 200
        for prompt in prompts:
            same(http.complete(prompt, f"new-{number}"), http.reference.answer(prompt, which, TOKENS), which)
        assert unload(http, f"new-{number}")[0] == 200

    with ThreadPoolExecutor(4) as clients:
        coming = [clients.submit(come_and_go, number) for number in range(8)]
        for _ in range(3):
            http.check([(prompt, name) for prompt in prompts for name in (None, "one", "two")])
        for one in coming:
            one.result()


def test_requests_keep_an_adapter_that_is_unloaded_or_refused_a_change(http: Http) -> None:
    (prompt,) = some_prompts((50,))
    assert load(http, "new", http.later["x"])[0] == 200
    with ThreadPoolExecutor(1) as client:
        long = client.submit(http.complete, prompt, "new", max_tokens=250)
        time.sleep(0.3)
        status, message = load(http, "new", http.later["x"], load_inplace=True)
        assert status == 400 and "can't be replaced" in message
        assert unload(http, "new")[0] == 200
        assert not long.done()
        same(long.result(), http.reference.answer(prompt, "x", 250), "new")


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        ("one", {"vllm_xargs": {"subspaces": "style"}}, "no subspaces"),
        ("one", {"vllm_xargs": {"scale": "half"}}, "scale='half' is no strength"),
        ("subspaces", {"vllm_xargs": {"subspaces": "tone"}}, "tone"),
        ("subspaces", {"vllm_xargs": {"subspaces": 7}}, "subspaces=7"),
        ("subspaces", {"vllm_xargs": {"subspaces": ["style"]}}, r"subspaces=['style']"),
        ("one", {"vllm_xargs": {"peft_reft": "x"}}, "plugin's own"),
        ("base", {"vllm_xargs": {"peft_reft": ["x"]}}, "plugin's own"),
        ("one", {"use_beam_search": True, "n": 2}, "beam search"),
    ],
)
def test_a_bad_request_is_answered_with_its_reason(http: Http, model: str, fields: Any, words: str) -> None:
    (prompt,) = some_prompts((20,))
    for path, asked in (
        ("completions", {"prompt": prompt}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ):
        status, message = http.post(path, model=model, max_tokens=2, **asked, **fields)
        assert status == 400 and words in message, (path, status, message)
    http.check([(prompt, "one"), (prompt, None)])


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_adapter_is_refused_and_the_server_goes_on(http: Http, tmp_path: Path, what: str) -> None:
    folder, words = break_adapter(http.base, http.folders["one"], tmp_path, what)
    status, message = load(http, "bad", str(folder))
    # vLLM takes paths with their file's name out of its messages, so the client's name of the adapter stands there.
    assert status in (400, 404) and "bad" in message, (status, message)
    assert words in message or words.endswith(".safetensors"), message
    (prompt,) = some_prompts((40,))
    assert http.post("completions", model="bad", prompt=prompt, max_tokens=1)[0] == 404
    http.check([(prompt, "one"), (prompt, "lora"), (prompt, None)])
