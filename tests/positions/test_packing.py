"""Packed batches of several collators give the logits and gradients of their sequences run one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import PAD, VOCAB, build, randomize
from peft import PeftModel, get_peft_model
from transformers import DataCollatorWithFlattening

from peft_reft import ReftConfig


LENGTHS = [(9, 4), (6, 2), (12, 9), (5, 1)]  # tokens, and tokens of the prompt


def features() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length, prompt in LENGTHS:
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def flattening(**options) -> Callable:
    return DataCollatorWithFlattening(**options)


def trl_padding_free() -> Callable:
    trainer = pytest.importorskip("trl.trainer.sft_trainer", reason="needs trl")
    return trainer.DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)


def axolotl_multipack() -> Callable:
    collators = pytest.importorskip("axolotl.utils.collators.batching", reason="needs axolotl")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": PAD, **{str(n): n for n in range(1, VOCAB)}}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    collate = collators.V2BatchSamplerDataCollatorForSeq2Seq(
        tokenizer, padding=True, pad_to_multiple_of=40, return_tensors="pt"
    )

    def with_positions(rows: list[dict]) -> dict:
        # axolotl datasets have both; the trainer drops attention_mask where the attention tells sequences by positions
        lengths = [len(row["input_ids"]) for row in rows]
        columns = [{"position_ids": list(range(n)), "attention_mask": [1] * n} for n in lengths]
        rows = [{**row, **more} for row, more in zip(rows, columns)]
        return dict(collate([rows]))

    return with_positions


COLLATORS = {
    "transformers": lambda: flattening(),
    "transformers, cu_seq_lens": lambda: flattening(return_flash_attn_kwargs=True),
    "transformers, seq_idx": lambda: flattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "trl": trl_padding_free,
    "axolotl": axolotl_multipack,
}


def adapted(positions: str, name: str = "llama", **settings) -> PeftModel:
    config = ReftConfig(r=4, positions=positions, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(build(name), config).eval()  # no dropout
    randomize(model)
    return model


def loss(logits: torch.Tensor, ids: list[int], prompt: int) -> torch.Tensor:
    """The summed loss of one sequence's answer."""
    return F.cross_entropy(logits[prompt - 1 : -1], torch.tensor(ids[prompt:]), reduction="sum")


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("positions", ["f2+l3", "l1", "all"])
@pytest.mark.parametrize("collator", COLLATORS)
def test_a_packed_row_equals_its_sequences_run_alone(collator, positions, name):
    rows = features()
    batch = COLLATORS[collator]()([dict(row) for row in rows])
    batch.pop("attention_mask", None)
    packed, apart = adapted(positions, name), adapted(positions, name)
    assert batch["input_ids"].shape[0] == 1
    row = packed(**batch, use_cache=False).logits[0]
    total, start = 0.0, 0
    for (length, prompt), sequence in zip(LENGTHS, rows):
        alone = apart(**{key: torch.tensor([value]) for key, value in sequence.items()}).logits[0]
        torch.testing.assert_close(row[start : start + length], alone, rtol=0, atol=2e-4)
        (loss(alone, sequence["input_ids"], prompt)).backward()
        total = total + loss(row[start : start + length], sequence["input_ids"], prompt)
        start += length
    total.backward()
    expected = gradients(apart)
    assert len(expected) == 9
    for key, gradient in gradients(packed).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-3)


def test_a_numbered_mask_separates_sequences_without_positions():
    """axolotl's other form, for attention that reads the numbers: the same tokens are edited."""
    rows = features()
    batch = axolotl_multipack()([dict(row) for row in rows])
    model = adapted("f2+l3")
    numbered = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
    assert batch["attention_mask"].max() == 4
    mask = torch.zeros_like(batch["input_ids"])
    start = 0
    for length, prompt in LENGTHS:
        first, last = (2, 3) if prompt >= 5 else (min(2, prompt // 2), min(3, prompt // 2))
        mask[0, start : start + first] = 1
        mask[0, start + prompt - last : start + prompt] = 2
        start += length
    with torch.no_grad():
        by_mask = model(**{**numbered, "intervention_mask": mask}, use_cache=False).logits
        torch.testing.assert_close(model(**numbered, use_cache=False).logits, by_mask)


def test_lengths_for_packed_rows():
    """One length for each sequence, and not for each row."""
    batch = flattening()([dict(row) for row in features()])
    labels = batch.pop("labels")
    model = adapted("f2+l3")
    with torch.no_grad():
        by_labels = model(**batch, labels=labels, use_cache=False).logits
        by_lengths = model(**batch, prompt_lengths=torch.tensor([4, 2, 9, 1]), use_cache=False).logits
    assert torch.equal(by_lengths, by_labels)
    with pytest.raises(
        ValueError, match=r"prompt_lengths has shape \[1\], but the batch has 4 sequences in its packed rows"
    ):
        model(**batch, prompt_lengths=torch.tensor([4]), use_cache=False)
