"""TRL's trainers with `peft_config=ReftConfig(...)` where one would pass a LoraConfig: which tokens each of their
forwards edits.

The edited tokens are seen from outside, as the difference that the wrapper makes to the first block's output.
"""

from __future__ import annotations

import importlib
import json
import warnings
from typing import Any

import pytest
import torch
from models import CHAT_VOCAB, GROUPED, chat_model, tokenizer
from packaging.version import Version
from peft import get_peft_model
from torch import nn

from peft_reft import PromptLengthsCollator, ReftConfig, ReftLayer


trl = pytest.importorskip("trl", reason="needs trl")
datasets = pytest.importorskip("datasets")
# From this version on, TRL's trainers pass labels to the model for preferences as well.
PASSES_LABELS = Version(trl.__version__) >= Version("1.16")
REFT_W = "base_model.model.model.layers.0.reft_W.default"
OPENING = "<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CI", "1")
    warnings.filterwarnings("ignore")


def chat(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def reply(answer: str) -> list[dict]:
    return [{"role": "assistant", "content": answer}]


QUESTIONS = ["Name a colour.", "What is the answer to this question?", "Why?", "Describe a task that I know."]
ANSWERS = ["Blue.", "I do not know that.", "No.", "It is to answer."]
PAIRS = list(zip(QUESTIONS, ANSWERS)) * 2


class Watch:
    """Records the tokens of every forward of a model's first edited block, and which of them are edited."""

    def __init__(self, model: nn.Module) -> None:
        self.forwards: list[tuple[list[list[int]], list[list[int]]]] = []
        base = model.get_base_model()
        layer = next(module for module in model.modules() if isinstance(module, ReftLayer))
        layer.get_base_layer().register_forward_hook(
            lambda m, a, out: setattr(self, "before", self.tensor(out).clone())
        )
        layer.register_forward_hook(lambda m, a, out: self.note(self.tensor(out)))
        base.register_forward_pre_hook(
            lambda m, a, kwargs: setattr(self, "ids", kwargs["input_ids"]), with_kwargs=True
        )

    @staticmethod
    def tensor(output: Any) -> torch.Tensor:
        return (output[0] if isinstance(output, tuple) else output).detach()

    def note(self, after: torch.Tensor) -> None:
        changed = (after - self.before).abs().amax(dim=-1) > 0
        self.forwards.append((self.ids.tolist(), [row.nonzero().flatten().tolist() for row in changed]))

    def check(self, expected) -> None:
        """Every forward edits the tokens that `expected` returns for its ids, or none, with the adapter off."""
        assert self.forwards
        for ids, edited in self.forwards:
            if any(edited):
                assert edited == [expected(row) for row in ids]

    @property
    def edits(self) -> list[bool]:
        return [any(edited) for _, edited in self.forwards]


def after_opening(ids: list[int], start: int = 0) -> int:
    """The column at which the first answer begins, by the text of the tokens."""
    tokens = tokenizer()
    for end in range(start + 1, len(ids) + 1):
        if tokens.decode(ids[start:end]).endswith(OPENING):
            return end
    raise AssertionError(tokens.decode(ids[start:]))


def f1_l2(ids: list[int]) -> list[int]:
    """The columns that f1+l2 edits in a conversation, padded on either side."""
    start = next(place for place, token in enumerate(ids) if token != 0)
    end = after_opening(ids, start)
    return [start, end - 2, end - 1]


def config(**settings) -> ReftConfig:
    # a start that differs from the base model, so that edits show, and no dropout of either
    return ReftConfig(**{"r": 4, "positions": "f1+l2", "task_type": "CAUSAL_LM", "init_weights": "pyreft", **settings})


def arguments(cls: type, folder, **settings) -> Any:
    return cls(
        output_dir=str(folder),
        **{
            "max_steps": 2,
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "report_to": "none",
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "disable_tqdm": True,
            **settings,
        },
    )


def train(trainer: Any) -> Watch:
    """Train, and see that every weight of the adapter moved, and none of the base."""
    watch = Watch(trainer.model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".reft_" in name or "modules_to_save" in name), name
    return watch


def preferences(**columns: list) -> Any:
    return datasets.Dataset.from_dict(columns)


def pairs_of_answers() -> Any:
    return preferences(
        prompt=[chat(q) for q, _ in PAIRS],
        chosen=[reply(a) for _, a in PAIRS],
        rejected=[reply("user") for _ in PAIRS],
    )


# -- supervised -------------------------------------------------------------------------------------------------------


def sft(tmp_path, data, reft: ReftConfig, **settings) -> Any:
    return trl.SFTTrainer(
        model=chat_model(),
        args=arguments(trl.SFTConfig, tmp_path, **settings),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=reft,
    )


def conversations() -> Any:
    return preferences(prompt=[chat(q) for q, _ in PAIRS], completion=[reply(a) for _, a in PAIRS])


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft(tmp_path, checkpointing):
    train(sft(tmp_path, conversations(), config(), gradient_checkpointing=checkpointing)).check(f1_l2)


@pytest.mark.parametrize("template", [None, OPENING])
@pytest.mark.parametrize(
    "how", [{"packing": True, "max_length": 96}, {"padding_free": True, "max_length": None}], ids=str
)
def test_sft_packed(tmp_path, how, template):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    reft = config(response_template=template, tokenizer_name_or_path=str(tmp_path / "tokenizer"))

    def each_of_the_row(ids: list[int]) -> list[int]:
        opening = tokenizer()("<|im_start|>user\n")["input_ids"][0]
        # a conversation begins with <|im_start|> at the start of a row, or after the line end of the one before
        text_starts = [
            n
            for n, token in enumerate(ids)
            if token == opening and tokenizer().decode(ids[n : n + 3]).startswith("<|im_start|>user")
        ]
        edited = []
        for start in text_starts:
            end = after_opening(ids, start)
            edited += [start, end - 2, end - 1]
        return edited

    watch = train(sft(tmp_path, conversations(), reft, **how))
    watch.check(each_of_the_row)
    assert max(len(edited[0]) for _, edited in watch.forwards) >= 6  # several conversations in a row


@pytest.mark.parametrize(
    "how", [{}, {"packing": True, "max_length": 96}, {"padding_free": True, "max_length": None}], ids=str
)
def test_sft_on_messages(tmp_path, how):
    """TRL trains on all tokens of `messages`. The chat template says where answers begin."""
    data = preferences(messages=[chat(q) + reply(a) for q, a in PAIRS])
    trainer = sft(tmp_path, data, config(), save_strategy="steps", save_steps=2, **how)
    watch = train(trainer)
    if how:
        user = tokenizer()("<|im_start|>user", add_special_tokens=False)["input_ids"]
        for (ids,), (edited,) in watch.forwards:
            starts = [n for n in range(len(ids)) if ids[n : n + len(user)] == user]
            ends = [after_opening(ids, n) for n in starts if tokenizer().decode(ids[n:]).find(OPENING) >= 0]
            assert edited == sorted([*starts[: len(ends)], *(end - back for end in ends for back in (1, 2))])
        assert max(len(edited[0]) for _, edited in watch.forwards) >= 6
    else:
        watch.check(f1_l2)
    saved = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert tokenizer().decode(saved["response_template"]) == OPENING and saved["response_template_optional"]


def test_the_trainers_tokenizer_goes_before_the_base_models(tmp_path):
    """The data are rendered by it, so answers begin where its chat template says."""
    other = tokenizer()
    other.chat_template = other.chat_template.replace("<|im_start|>assistant", "<|im_start|>user: assistant")
    other.save_pretrained(tmp_path / "base")
    chat_model().save_pretrained(tmp_path / "base")
    trainer = trl.SFTTrainer(
        model=str(tmp_path / "base"),
        args=arguments(trl.SFTConfig, tmp_path, max_steps=1),
        train_dataset=preferences(messages=[chat(q) + reply(a) for q, a in PAIRS]),
        processing_class=tokenizer(),
        peft_config=config(),
    )
    train(trainer).check(f1_l2)
    assert tokenizer().decode(trainer.model.peft_config["default"].response_template) == OPENING


def test_sft_on_text_without_an_answer(tmp_path):
    data = preferences(text=[q for q, _ in PAIRS])
    with pytest.raises(
        ValueError, match="no prompt tokens to edit.*prompt_lengths.*PromptLengthsCollator.*response_template"
    ):
        sft(tmp_path, data, config()).train()
    with pytest.raises(ValueError, match="no prompt tokens to edit"):  # TRL masks the first token of each packed text
        sft(tmp_path, data, config(), packing=True, max_length=64).train()
    train(sft(tmp_path, data, config(positions="all")))


@pytest.mark.parametrize("length", [None, 14])
def test_sft_on_prompts_too(tmp_path, length):
    """`completion_only_loss=False`: labels mark no prompt, and the completion mask, which TRL drops, does."""
    data = preferences(prompt=["Name a colour."] * 4, completion=[" Blue, I do not know that."] * 4)
    settings = {"completion_only_loss": False, "max_length": length}
    prompt = len(tokenizer()("Name a colour.")["input_ids"])
    assert prompt < 14

    def expected(ids: list[int]) -> list[int]:
        return [0, prompt - 2, prompt - 1]

    watch = train(sft(tmp_path, data, config(), **settings))
    watch.check(expected)
    assert length is None or max(len(row) for ids, _ in watch.forwards for row in ids) == length
    with pytest.raises(ValueError, match="no prompt tokens to edit.*response_template"):  # packing drops the mask
        sft(tmp_path, data, config(), packing=True, **{**settings, "max_length": 64}).train()
    reft = config(response_template=tokenizer()(" colour.")["input_ids"][-2:])  # the error's way out
    assert any(train(sft(tmp_path, data, reft, packing=True, **{**settings, "max_length": 64})).edits)


def test_sft_in_which_labels_do_not_reach_the_model(tmp_path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    settings = {"label_smoothing_factor": 0.1, "loss_type": "nll"}
    with pytest.raises(ValueError, match="training batch without labels.*response_template"):
        sft(tmp_path, conversations(), config(response_template=None), **settings).train()
    train(sft(tmp_path, conversations(), config(), **settings)).check(f1_l2)
    reft = config(response_template=OPENING, tokenizer_name_or_path=str(tmp_path / "tokenizer"))
    train(sft(tmp_path, conversations(), reft, **settings)).check(f1_l2)


# -- preferences ------------------------------------------------------------------------------------------------------


def dpo(tmp_path, reft: ReftConfig, **settings) -> Any:
    return trl.DPOTrainer(
        model=chat_model(),
        args=arguments(trl.DPOConfig, tmp_path, **settings),
        train_dataset=pairs_of_answers(),
        processing_class=tokenizer(),
        peft_config=reft,
    )


def kto(tmp_path, reft: ReftConfig, **settings) -> Any:
    data = preferences(
        prompt=[chat(q) for q, _ in PAIRS],
        completion=[reply(a) for _, a in PAIRS],
        label=[n % 2 == 0 for n in range(len(PAIRS))],
    )
    module = trl if hasattr(trl, "KTOTrainer") else importlib.import_module("trl.experimental.kto")
    return module.KTOTrainer(
        model=chat_model(),
        args=arguments(module.KTOConfig, tmp_path, **settings),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=reft,
    )


@pytest.mark.parametrize("make", [dpo, kto])
def test_preferences_by_the_collator(tmp_path, make):
    trainer = make(tmp_path, config())
    trainer.data_collator = PromptLengthsCollator(trainer.data_collator)
    watch = train(trainer)
    watch.check(f1_l2)
    assert True in watch.edits and False in watch.edits  # the reference is the model with its adapter off


@pytest.mark.parametrize("make", [dpo, kto])
def test_preferences_by_the_template(tmp_path, make):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    watch = train(
        make(tmp_path, config(response_template=OPENING, tokenizer_name_or_path=str(tmp_path / "tokenizer")))
    )
    watch.check(f1_l2)
    assert True in watch.edits and False in watch.edits


@pytest.mark.parametrize("make", [dpo, kto])
def test_preferences_that_do_not_say_where_prompts_end(tmp_path, make):
    train(make(tmp_path, config())).check(f1_l2)  # the chat template says it
    if PASSES_LABELS:
        train(make(tmp_path, config(response_template=None))).check(f1_l2)
    else:
        with pytest.raises(ValueError, match="PromptLengthsCollator.*response_template"):
            make(tmp_path, config(response_template=None)).train()


def test_dpo_starts_at_its_reference(tmp_path):
    trainer = dpo(tmp_path, config(init_weights=True, dropout=0.0), max_steps=1, logging_steps=1)
    trainer.data_collator = PromptLengthsCollator(trainer.data_collator)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("precomputed", [False, True])
def test_the_reference_of_a_trained_adapter(tmp_path, precomputed):
    """TRL makes an adapter "ref", and finds no weights of ReFT to copy into it: it starts as a copy by itself."""
    model = get_peft_model(chat_model(), config(modules_to_save=["lm_head"]))
    with torch.no_grad():  # the saved module differs from the base's, too
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.mul_(1.5)
    trainer = trl.DPOTrainer(
        model=model,
        args=arguments(trl.DPOConfig, tmp_path, max_steps=1, logging_steps=1, precompute_ref_log_probs=precomputed),
        train_dataset=pairs_of_answers(),
        processing_class=tokenizer(),
    )
    for name, parameter in model.named_parameters():
        if ".default" in name:
            assert torch.equal(parameter, model.get_parameter(name.replace(".default", ".ref"))), name
    if not PASSES_LABELS:
        trainer.data_collator = PromptLengthsCollator(trainer.data_collator)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    # the reference is the adapter of the start, and not the base
    assert not torch.equal(model.get_parameter(REFT_W), model.get_parameter(REFT_W.replace("default", "ref")))
    assert model.get_parameter(REFT_W.replace("default", "ref")).abs().max() > 0


def test_an_adapter_named_ref_of_ones_own():
    """Another config is another adapter, whatever its name."""
    model = get_peft_model(chat_model(), config())
    model.add_adapter("ref", config())
    assert not torch.equal(model.get_parameter(REFT_W), model.get_parameter(REFT_W.replace("default", "ref")))


def test_dropout_is_off_in_preference_training(tmp_path):
    """TRL switches off every dropout module that it finds, and so ReFT's."""
    trainer = dpo(tmp_path, config(dropout=0.5))
    layers = [module for module in trainer.model.modules() if isinstance(module, ReftLayer)]
    assert [layer.reft_dropout["default"].p for layer in layers] == [0, 0, 0]


def test_the_collator_does_not_guess():
    with pytest.raises(ValueError, match="neither completion_mask.*nor labels.*response_template"):
        PromptLengthsCollator(lambda features: {"input_ids": torch.ones(2, 3)})([])


@pytest.mark.parametrize("key", ["labels", "completion_mask"])
def test_the_collator_does_not_count_padding(key):
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
    answers = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    value = answers if key == "completion_mask" else answers * 107 - 100
    batch = PromptLengthsCollator(lambda features: {key: value, "attention_mask": attention_mask})([])
    assert batch["prompt_lengths"].tolist() == [2, 1, 3]  # a row without an answer is all prompt
    told = {"prompt_lengths": torch.tensor([5, 5, 5])}
    assert PromptLengthsCollator(lambda features: dict(told))([]) == told


def test_the_collator_on_packed_rows_and_its_own_attributes():
    class Packing:
        pad_token_id = 7

        def __call__(self, features):
            labels = torch.tensor([[-100, -100, 5, -100, 5, 5, -100, -100, -100, 5]])
            return {"labels": labels, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2, 3]])}

    collator = PromptLengthsCollator(Packing())
    assert collator.pad_token_id == 7
    assert collator([])["prompt_lengths"].tolist() == [2, 1, 3]


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_reward_model(tmp_path):
    import transformers as t

    sizes = {**GROUPED, "vocab_size": CHAT_VOCAB, "max_position_embeddings": 512, "num_labels": 1}
    trainer = trl.RewardTrainer(
        model=t.LlamaForSequenceClassification(t.LlamaConfig(**sizes)),
        args=arguments(trl.RewardConfig, tmp_path),
        train_dataset=pairs_of_answers(),
        processing_class=tokenizer(),
        peft_config=config(task_type="SEQ_CLS", modules_to_save=["score"]),
    )

    def ends_of_all(ids: list[int]) -> list[int]:
        real = [place for place, token in enumerate(ids) if token != 0]
        return [real[0], real[-2], real[-1]]

    train(trainer).check(ends_of_all)


def grpo(tmp_path, reft: ReftConfig, **settings) -> Any:
    return trl.GRPOTrainer(
        model=chat_model(),
        reward_funcs=lambda completions, **_: [float(n % 2) for n in range(len(completions))],
        args=arguments(trl.GRPOConfig, tmp_path, num_generations=2, max_completion_length=6, beta=0.1, **settings),
        train_dataset=preferences(prompt=[chat(q) for q, _ in PAIRS]),
        processing_class=tokenizer(),
        peft_config=reft,
    )


def test_grpo(tmp_path):
    """Its rollouts edit, in their prefill, what the training forwards edit; its reference edits nothing."""
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    trainer = grpo(tmp_path, config(response_template=OPENING, tokenizer_name_or_path=str(tmp_path / "tokenizer")))
    watch = train(trainer)
    watch.check(f1_l2)
    decoding = [edited for ids, edited in watch.forwards if len(ids[0]) == 1]
    assert decoding and not any(any(rows) for rows in decoding)
    assert sum(watch.edits) >= 4


def test_grpo_without_a_template(tmp_path):
    train(grpo(tmp_path, config())).check(f1_l2)  # the chat template says it
    if PASSES_LABELS:
        train(grpo(tmp_path, config(response_template=None))).check(f1_l2)
    else:
        with pytest.raises(ValueError, match="training batch without labels.*response_template"):
            grpo(tmp_path, config(response_template=None)).train()
