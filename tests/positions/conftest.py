"""Fixtures that the tests of positions share."""

from __future__ import annotations

import pytest
from models import chat_model, tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny chat model with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("chat")
    chat_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
