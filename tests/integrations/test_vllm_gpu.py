"""vLLM on a GPU: both model runners, compiled, with and without CUDA graphs, in float32 and bfloat16.

Nobody has run these tests yet. They run where vLLM finds CUDA: `python -m pytest tests/integrations/test_vllm_gpu.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch


pytest.importorskip("vllm")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from served import Reference, prompts_of
from test_vllm import LENGTHS, TOKENS, Server
from vllm import SamplingParams


pytestmark = pytest.mark.slow

ADAPTERS: dict[str, dict[str, Any]] = {
    "loreft": {},
    "last": {"positions": "l1", "layers_to_transform": [1]},
    "all": {"positions": "all"},
}
GRAPHS = ["NONE", "PIECEWISE", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"]


@pytest.fixture(params=["0", "1"], ids=["V1", "V2"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", request.param)
    monkeypatch.setenv("PEFT_REFT_VLLM_UNTESTED", "1")
    return request.param


def serve(folder: Path, runner: str, cudagraph_mode: str, **engine: Any) -> Server:
    settings = {
        "enforce_eager": False,
        "compilation_config": {"cudagraph_mode": cudagraph_mode, "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
        "gpu_memory_utilization": 0.3,
        **engine,
    }
    server = Server(folder, ADAPTERS, engine=settings)
    assert server.engine.llm_engine.vllm_config.use_v2_model_runner is (runner == "1")
    return server


@pytest.mark.parametrize("cudagraph_mode", GRAPHS)
def test_a_batch_of_base_and_adapters_twice(tmp_path: Path, runner: str, cudagraph_mode: str) -> None:
    server = serve(tmp_path, runner, cudagraph_mode)
    asked = [(prompt, name) for prompt in prompts_of(LENGTHS) for name in (None, *ADAPTERS)]
    for _ in range(2):  # the second round reads the prefix cache: then a prefill of one token is the size of a decode
        server.check(asked)
    for prompt, name in asked[-8:]:  # small batches, which CUDA graphs were recorded for
        server.check([(prompt, name)])


def test_chunked_prefill_in_recorded_sizes(tmp_path: Path, runner: str) -> None:
    server = serve(tmp_path, runner, "FULL_AND_PIECEWISE", max_num_batched_tokens=32, max_num_seqs=8)
    server.check([(prompt, name) for prompt in prompts_of(LENGTHS) for name in (None, *ADAPTERS)])


def test_no_graph_is_replayed_where_something_is_edited(tmp_path: Path, runner: str) -> None:
    """`EditedModel.finish` ends the engine, where a graph is replayed without an edit."""
    from peft_reft.integrations.vllm.worker import EditedModel

    server = serve(tmp_path, runner, "FULL_AND_PIECEWISE")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="without the edits"):
        patch.setattr(EditedModel, "edits", property(lambda self: False, lambda self, value: None), raising=False)
        server.check([(prompts_of([20])[0], "all")])


@pytest.mark.parametrize("cudagraph_mode", ["NONE", "FULL_AND_PIECEWISE"])
def test_bfloat16_is_as_near_to_float32_as_the_peft_model_in_bfloat16(
    tmp_path: Path, runner: str, cudagraph_mode: str
) -> None:
    server = serve(tmp_path, runner, cudagraph_mode, dtype="bfloat16")
    in_bfloat16 = Reference(server.base, server.folders)
    for model in in_bfloat16.adapted.values():
        model.to("cuda", torch.bfloat16)
    for name in ADAPTERS:
        for prompt in prompts_of([40, 130]):
            params = SamplingParams(temperature=0, max_tokens=TOKENS, prompt_logprobs=0, detokenize=False)
            output = server.engine.generate(
                {"prompt_token_ids": prompt}, params, lora_request=server.requests[name], use_tqdm=False
            )[0]
            given = torch.tensor([step[i].logprob for step, i in zip(output.prompt_logprobs[1:], prompt[1:])])
            expected, narrow = (
                _given_tokens(reference.adapted[name], prompt) for reference in (server.reference, in_bfloat16)
            )
            assert (given - expected).abs().mean() < 2 * (narrow - expected).abs().mean() + 1e-3, (name, len(prompt))


@torch.no_grad()
def _given_tokens(model: Any, prompt: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    logits = model(input_ids=ids, prompt_lengths=torch.tensor([len(prompt)], device=ids.device)).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
