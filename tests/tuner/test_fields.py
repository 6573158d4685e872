"""ReftConfig's fields stand in one table, and what other code says of them is derived from it."""

from __future__ import annotations

import pytest

from peft_reft.tuner.config import own_fields


def test_every_field_is_described_by_the_docstring():
    helps = {name: one.metadata.get("help", "") for name, one in own_fields().items()}
    assert all(len(text) > 20 for text in helps.values()), helps
    assert helps["prompt_boundary"].startswith(
        'The prompts of a conversation of several turns. `"first"` (default): the tokens before the first answer'
    )
    assert helps["exclude_modules"] == "Names or one regex of modules to leave alone."


def test_each_field_has_one_key_of_axolotl_or_a_reason_for_none():
    """keys.py needs no axolotl."""
    from peft_reft.integrations.axolotl import keys

    shared, block = list(keys.SHARED_KEYS.values()), list(keys.BLOCK_FIELDS)
    assert sorted([*shared, *block, *keys.SET_ELSEWHERE]) == sorted(own_fields())


def test_each_key_of_the_block_is_described():
    pytest.importorskip("axolotl")
    from peft_reft.integrations.axolotl import args, keys

    assert set(args.ReftBlock.model_fields) == {*keys.BLOCK_FIELDS, *keys.LOGGING_KEYS}
    for name in keys.BLOCK_FIELDS:
        assert args.ReftBlock.model_fields[name].description == own_fields()[name].metadata["help"]
