"""Everything that must hold for ReFT on a tiny model of an architecture, without a name of a module of it.

Where the states of a token lie in a block's output is read from sizes that all differ: B = 2 rows, S = 6 tokens, 4
streams a token, width 32.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import randomize
from paths import REPOSITORY
from peft import PeftModel, get_peft_model
from torch import Tensor
from zoo import EOS, PAD, architectures, classes, tiny

from peft_reft import ReftConfig, ReftLayer
from peft_reft.tuner.layouts import WITHOUT_ROWS


B, S, PADDING = 2, 6, 2
PADDED = ("longformer", "led", "reformer", "big_bird")  # these put tokens of their own after the caller's


class BaseFails(Exception):
    """The base model itself can't do it, so that there is nothing to compare with."""


def batch(rows: int, tokens: int, left: bool) -> dict[str, Tensor]:
    """Token ids and a mask. Each row after the first has two padding tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, :PADDING] = 0
    if not left:
        mask = mask.flip(1)
    if not left:  # as BART's classifier wants it
        ids[torch.arange(rows), mask.sum(1) - 1] = EOS
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def call(model: Any, **inputs: Any) -> Any:
    torch.manual_seed(0)  # Reformer hashes by chance
    return model(**inputs)


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return call(model, **inputs).logits


def adapt(make: Any, **settings: Any) -> tuple[Any, str | None]:
    """The model with an adapter, and the target_modules that a refusal told to use, if any."""
    try:
        return get_peft_model(make(), ReftConfig(r=2, **settings)).eval(), None
    except ValueError as refusal:
        told = re.search(r"target_modules=('.*?')[.,]?( |$)", str(refusal))
        if told is None:
            raise
        target = eval(told[1])
        return get_peft_model(make(), ReftConfig(r=2, target_modules=target, **settings)).eval(), target


def edited_layers(model: Any) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def first_output(model: Any, inputs: dict[str, Tensor], with_edit: bool) -> Tensor:
    """What the first edited module that runs returns in a forward, before or after the edit."""
    seen: list[Tensor] = []
    places = [layer if with_edit else layer.base_layer for layer in edited_layers(model)]

    def note(module: Any, args: tuple, output: Any) -> None:
        seen.append((output[0] if isinstance(output, (tuple, list)) else output).clone())

    handles = [place.register_forward_hook(note) for place in places]
    try:
        logits(model, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


def check_place(model: Any, inputs: dict[str, Tensor], prefix: int = 0) -> None:
    """The last real token of each row is edited by the formula, in the first edited module, and nothing else is."""
    with model.disable_adapter():
        before = first_output(model, inputs, with_edit=False)
    after = first_output(model, inputs, with_edit=True)
    layer = edited_layers(model)[0]
    if model.get_base_model().config.model_type in PADDED:
        assert before.shape[1] >= S
        before, after = before[:, :S], after[:, :S]
    if ngram := getattr(model.get_base_model().config, "ngram", 0):  # ProphetNet: the tokens of each of its streams
        before, after = (state.unflatten(1, (1 + ngram, S)) for state in (before, after))
    R, W, b = layer.reft_R["default"][0], layer.reft_W["default"][0], layer.reft_b["default"][0]
    sizes = [size - prefix if axis == 1 else size for axis, size in enumerate(before.shape)]
    rows, tokens = sizes.index(B), sizes.index(S)
    before, after = before.movedim((rows, tokens), (0, 1)), after.movedim((rows, tokens), (0, 1))
    expected = before.clone()
    for row in range(B):
        last = int(inputs["attention_mask"][row].nonzero().max()) + prefix
        h = expected[row, last]
        if h.dim() == 2 and h[0].numel() == R.shape[1]:
            h = h[0]  # of several streams, the active one
        flat = h.flatten().float()
        h.copy_((flat + R.T @ (W @ flat + b - R @ flat)).view_as(h))
    assert not torch.allclose(expected, before, atol=1e-3), "the edit is too small to be seen"
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    call(model, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if ".reft_" in name and p.grad is not None}


def check_training(model: Any, inputs: dict[str, Any]) -> None:
    """A step gives finite gradients to the adapter and moves it; with checkpointing, the gradients are the same."""
    with model.disable_adapter():
        try:
            call(model, **inputs)
        except Exception as error:
            raise BaseFails(f"train: {type(error).__name__}: {str(error)[:150]}") from error
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".reft_" in name}
    plain = gradients(model, inputs)
    assert plain and all(g.isfinite().all() for g in plain.values()), "no gradient, or one that is not finite"
    assert any(g.abs().max() > 0 for g in plain.values()), "every gradient is zero"
    base = model.get_base_model()
    if base.supports_gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients(model, inputs)
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()  # BLT writes into its embeddings, which this had changed
        assert set(again) == set(plain)
        for name, gradient in plain.items():
            apart = (again[name] - gradient).abs().max()
            assert apart <= 1e-3 * gradient.abs().max() + 1e-6, f"{name}: checkpointing moves the gradient by {apart}"
    gradients(model, inputs)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    moved = [name for name, p in model.named_parameters() if ".reft_" in name and not torch.equal(p, before[name])]
    assert moved, "a step moves no weight"
    model.eval()


def check_rows(model: Any, inputs: dict[str, Tensor], plain: Any) -> None:
    """A square batch gives each row what the row gives alone, as far as the base model does."""

    def apart(of: Any) -> Tensor:
        together = logits(of, **inputs)
        alone = torch.cat([logits(of, **{k: v[i : i + 1] for k, v in inputs.items()}) for i in range(len(together))])
        real = inputs["attention_mask"].bool() if together.dim() == 3 else ...
        return (together - alone)[real].abs().max()

    with model.disable_adapter():
        base = apart(plain)
    assert apart(model) <= 2 * base + 1e-3, (
        f"rows of a square batch differ from the rows alone: {apart(model)}, base {base}"
    )


def check_generation(model: Any, inputs: dict[str, Tensor]) -> None:
    """The logits of greedy decoding are those of one forward over the same tokens, as far as the base's are."""
    width = inputs["input_ids"].shape[1]

    def apart(prompt: dict[str, Any]) -> float:
        torch.manual_seed(0)
        done = model.generate(
            **inputs,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(len(done.sequences), 3)], dim=1)
        forced = logits(model, input_ids=done.sequences, attention_mask=mask, **prompt)
        steps = torch.stack(done.logits, dim=1)
        return float((forced[:, width - 1 : -1] - steps).abs().max() / steps.abs().max())

    with model.disable_adapter():
        try:
            assert model.get_base_model().can_generate()
            base = apart({})
        except Exception as error:
            raise BaseFails(f"generate: {type(error).__name__}: {str(error)[:150]}") from error
    ours = apart({"prompt_lengths": inputs["attention_mask"].sum(1)})
    assert ours <= 3 * base + 1e-3, f"generate and teacher forcing differ by {ours}, the base's by {base}"


def outcome(kind: str, model_type: str, model: str, folder: Path) -> str:
    """The outcome of `check`, in words for docs/architectures.md, also where there is nothing to check."""
    try:
        config_class, model_class = classes(model_type, model)
        tiny(config_class, model_class)
    except Exception as error:
        needs = "needs a package" if isinstance(error, ImportError) else "no tiny config"
        return f"not tried: {needs}"
    try:
        return check(config_class, model_class, kind, folder)
    except BaseFails:
        return "not tried: the base model needs more than token ids"


def check(config_class: type, model_class: type, kind: str, folder: Path) -> str:
    """Check an architecture.

    Args:
        config_class, model_class: Its classes.
        kind: A key of `zoo.KINDS`.
        folder: An empty folder, for an adapter.

    Returns:
        How it works, in words for docs/architectures.md.

    Raises:
        AssertionError: when something does not hold.
        BaseFails: when the base model does not run on token ids alone.
    """
    warnings.simplefilter("ignore")
    classifies = kind == "classification"
    inputs = batch(B, S, left=not classifies)

    def make() -> Any:
        base = tiny(config_class, model_class)
        with torch.no_grad():
            for parameter in base.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(4)
            for module in base.modules():
                # The embedding of padding starts as zero, where the square root in some norms has no gradient.
                if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = module.weight[5]
        return base

    base = make().requires_grad_(False)  # Mamba computes otherwise where its own weights are trained
    if base.config.model_type in WITHOUT_ROWS:
        with pytest.raises(ValueError, match="Set positions='all'"):
            adapt(make, positions="l1")
        get_peft_model(make(), ReftConfig(r=2, positions="all"))
        return "only with `positions='all'`"
    try:
        before = logits(base, **inputs)
        assert before.isfinite().all()
    except Exception as error:
        raise BaseFails from error
    task = "SEQ_CLS" if classifies else "CAUSAL_LM"
    model, told = adapt(make, positions="l1", task_type=task)
    torch.testing.assert_close(logits(model, **inputs), before, rtol=0, atol=0)
    randomize(model)
    assert classifies or (logits(model, **inputs) - before).abs().max() > 0
    check_place(
        model, inputs, prefix=getattr(base.config, "prompt_length", 0) if "cpm" in base.config.model_type else 0
    )

    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(make(), folder).eval()
    torch.testing.assert_close(logits(loaded, **inputs), logits(model, **inputs), rtol=0, atol=1e-6)

    square, _ = adapt(make, positions="l1", task_type=task)  # its first batch is square
    randomize(square)
    check_rows(square, batch(S, S, left=not classifies), square)

    notes = [] if told is None else [f"with `target_modules={told!r}`"]
    trained, _ = adapt(make, positions="f1+l1", task_type=task)
    randomize(trained)
    labels = torch.tensor([0, 1])
    if not classifies:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, : S - 2] = -100
    steps = [lambda: check_training(trained, {**inputs, "labels": labels})]
    if not classifies:
        steps.append(lambda: check_generation(square, inputs))
    for step in steps:
        try:
            step()
        except BaseFails as error:
            notes.append(f"the base model can't {str(error).split(':')[0]} so")
    return "; ".join(["works", *notes])


DOCUMENT = REPOSITORY / "docs" / "architectures.md"
HEADER = "| class | `model_type` | mapping | outcome |\n| --- | --- | --- | --- |\n"


def documented() -> dict[tuple[str, str, str], str]:
    """The outcomes in docs/architectures.md other than "works", by (kind, model_type, class)."""
    rows = re.findall(r"^\| `(\w+)` \| `([\w-]+)` \| (\w+) \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {(kind, model_type, model): text.replace("\\|", "|") for model, model_type, kind, text in rows}


def write_table() -> None:
    """Sweep everything, and write the outcomes other than "works" into the document."""
    rows, count = [], {}
    for kind, model_type, model in architectures():
        with tempfile.TemporaryDirectory() as folder:
            try:
                text = outcome(kind, model_type, model, Path(folder)).replace("|", "\\|")
            except Exception as error:
                text = f"WRONG: {type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
        print(kind, model_type, model, text, flush=True)
        count.setdefault(kind, []).append(text)
        if text != "works":
            rows.append(f"| `{model}` | `{model_type}` | {kind} | {text} |\n")
    before, after = re.split(r"\| class .*?\n(?=\n)", DOCUMENT.read_text(), maxsplit=1, flags=re.DOTALL)
    DOCUMENT.write_text(before + HEADER + "".join(sorted(rows)) + after)
    for kind, texts in count.items():
        print(kind, len(texts), "works:", sum(text.startswith("works") for text in texts))


if __name__ == "__main__":
    write_table()
