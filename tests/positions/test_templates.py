"""A response template of text is found however the tokenizer cuts its edges; one of ids, as it stands."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import chat_model, tokenizer
from peft import PeftModel, get_peft_model

from peft_reft import ReftConfig
from peft_reft.tuner.forward.transformers_api import text_template
from peft_reft.tuner.positions.template import IdTemplate, TextTemplate


TEMPLATES = ["<|im_start|>assistant\n", "### Response:", "### Response:\n", "\n\nanswer is ", "答：", "aab"]
KINDS = ["byte level", "sentencepiece"]
tokenizer = cache(tokenizer)


@cache
def template(text: str, kind: str) -> TextTemplate:
    return text_template(text, tokenizer(kind))


def ends_of(text: str, wanted: str, kind: str) -> tuple[torch.Tensor, list[int]]:
    """The ids of a text, and the indices of the tokens in which a match ends, by the characters that each covers."""
    encoded = tokenizer(kind)(text, return_offsets_mapping=True)
    ends, at = set(), text.find(wanted)
    while at >= 0:
        last = at + len(wanted) - 1
        covering = [n for n, (begin, end) in enumerate(encoded["offset_mapping"]) if begin <= last < end]
        ends.add(max(covering))  # a character may be several tokens, the last of which completes it
        at = text.find(wanted, at + 1)
    return torch.tensor([encoded["input_ids"]]), sorted(ends)


def matches(found: TextTemplate | IdTemplate, ids: torch.Tensor, starts: tuple[int, ...] = (0,)) -> list[int]:
    start = torch.zeros_like(ids, dtype=torch.bool)
    start[:, list(starts)] = True
    return found.matches(ids, start)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", TEMPLATES)
def test_text_is_found_whatever_stands_around_it(wanted, kind):
    pieces = [
        wanted,
        wanted[:-1],
        wanted[1:],
        "\n",
        " ",
        ":",
        "### ",
        "a",
        "答",
        "é",
        "<|im_end|>",
        "assistant",
        "user\n",
    ]

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(pieces), min_size=1, max_size=9))
    def property(parts: list[str]) -> None:
        ids, expected = ends_of("".join(parts), wanted, kind)
        assert matches(template(wanted, kind), ids) == expected

    property()


def test_no_match_crosses_the_start_of_a_sequence():
    ids, (end,) = ends_of("user\nxyz!w Blue", "xyz!w", "byte level")  # no merges: a token for each letter
    found = template("xyz!w", "byte level")
    assert matches(found, ids) == [end]
    assert matches(found, ids, starts=(0, end - 1)) == []
    assert matches(IdTemplate(ids[0, end - 2 : end + 1].tolist()), ids) == [end]
    assert matches(IdTemplate(ids[0, end - 2 : end + 1].tolist()), ids, starts=(0, end)) == []
    assert matches(IdTemplate(ids[0, end - 2 : end + 1].tolist()), ids, starts=(0, end - 2)) == [end]


def test_ids_that_the_tokenizer_does_not_have_end_a_search():
    """A vocabulary may have grown since the table was made; ids of image tokens may be negative or beyond it."""
    ids, (end,) = ends_of("xyz!w", "xyz!w", "byte level")
    for unknown in (-1, 10**6):
        spoiled = torch.cat([ids[:, : end - 1], torch.tensor([[unknown]]), ids[:, end - 1 :]], dim=1)
        assert matches(template("xyz!w", "byte level"), spoiled) == []
        after = torch.cat([torch.tensor([[unknown]]), ids], dim=1)
        assert matches(template("xyz!w", "byte level"), after) == [end + 1]

    # an unknown id is not taken for the token with the id 0
    padded, _ = ends_of("x<pad>y", "x<pad>y", "byte level")
    found = template("x<pad>y", "byte level")
    assert matches(found, padded) == [2]
    assert matches(found, padded.masked_fill(padded == 0, -1)) == []


def test_tokenizers_that_can_not_be_read():
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="neither. Give the token ids"):
        text_template("a", PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
    lower = tokenizer.__wrapped__()
    lower.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"response_template='### Response:' is not found.*response_template=\["):
        text_template("### Response:", lower)


def test_the_base_models_own_tokenizer_is_taken(checkpoint, tmp_path):
    """The tokenizer is loaded by the base model's name, so a loaded adapter finds its template again."""
    from transformers import AutoModelForCausalLM

    config = ReftConfig(r=4, positions="l1", response_template="### Response:", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for block in base.model.layers:
            block.reft_b["default"].normal_(0, 3.0)
    ids, (end,) = ends_of("Name a colour.\n### Response:\nBlue", "### Response:", "byte level")
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, model(input_ids=ids, prompt_lengths=torch.tensor([end + 1])).logits)
        assert not torch.equal(logits, model(input_ids=ids, prompt_lengths=torch.tensor([end])).logits)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)
        assert torch.equal(again(input_ids=ids).logits, logits)


def test_a_tokenizer_that_is_not_there(checkpoint):
    config = ReftConfig(r=4, response_template="### Response:")
    with pytest.raises(
        ValueError, match="needs a tokenizer.*Set tokenizer_name_or_path.*or give the template's token ids"
    ):
        get_peft_model(chat_model(), config)
    config.tokenizer_name_or_path = checkpoint
    get_peft_model(chat_model(), config)
    get_peft_model(chat_model(), ReftConfig(r=4, response_template=[7, 8]))
