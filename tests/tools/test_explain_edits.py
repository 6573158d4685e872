"""explain_edits: the sizes and losses that plain hooks on a plain base model measure, with the oracle's formulas."""

from __future__ import annotations

import io
import math

import pytest
import torch
from models import blocks, build, labelled, prompts, randomize, tokenizer, weight
from oracle import Edit, edited
from peft import get_peft_model
from torch import Tensor, nn

from peft_reft import ReftConfig, ReftLayer, explain_edits
from peft_reft.tools.explain_edits import ExplainedEdits
from peft_reft.tools.heat_map import draw_heat_map


class Measuring(Edit):
    """An edit of the oracle that notes by how much of its size it changes each state, in the order of its calls."""

    sizes: list[float]

    def __call__(self, h: Tensor, side: int) -> Tensor:
        changed = super().__call__(h, side)
        self.sizes.append(((changed - h).norm() / h.norm()).item())
        return changed


def adapted(architecture: str = "llama", **settings) -> nn.Module:
    settings = {"r": 4, "positions": "f2+l3", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(build(architecture), ReftConfig(**settings))
    randomize(model, scale=0.3)
    return model.eval()


def layers_of(model: nn.Module) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def edits_of(model: nn.Module) -> list[Measuring]:
    """The edits of each layer for the oracle."""
    made = []
    for layer in layers_of(model):
        R, W, b = (
            weight(layer, letter).detach() if "default" in getattr(layer, f"reft_{letter}") else None
            for letter in "RWb"
        )
        made.append(Measuring(layer.reft_config["default"].intervention, R, W, b, lambda x: x))
        made[-1].sizes = []
    return made


@torch.no_grad()
def by_hooks(architecture: str, edits: list[Measuring], indices: list[tuple[int, int, int]], batch: dict) -> float:
    """Run the plain base with these edits, which note their sizes, and return the loss."""
    base = build(architecture)
    with edited(list(blocks(base)), edits, indices):
        loss = base(**batch).loss
    return math.nan if loss is None else float(loss)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("intervention", ["loreft", "nodireft", "consreft"])
def test_sizes_and_losses_are_those_of_plain_hooks(architecture, intervention):
    model, batch = adapted(architecture, intervention=intervention), labelled(9, 7, prompt=4, seed=1)
    # A prompt of 4 tokens has 2 first ones, and the other 2 of the 3 last ones that were asked for.
    indices = [(row, column, column // 2) for row in (0, 1) for column in range(4)]
    found = explain_edits(model, batch, quiet=True)

    edits = edits_of(model)
    loss = by_hooks(architecture, edits, indices, batch)
    assert [(token.row, token.column) for token in found.tokens] == [(row, column) for row, column, _ in indices]
    for layer, edit in zip(found.layers, edits, strict=True):
        assert list(layer.sizes.values()) == pytest.approx(edit.sizes, rel=1e-4)
        assert layer.mean == pytest.approx(sum(edit.sizes) / len(edit.sizes), rel=1e-4)
    assert [layer.name for layer in found.layers] == [layer.name for layer in layers_of(model)]
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.loss_of_base == pytest.approx(by_hooks(architecture, [], [], batch), rel=1e-5)
    for number, layer in enumerate(found.layers):
        others = [edit for index, edit in enumerate(edits_of(model)) if index != number]
        base = build(architecture)
        kept = [block for index, block in enumerate(blocks(base)) if index != number]
        with torch.no_grad(), edited(kept, others, indices):
            assert layer.loss_without == pytest.approx(float(base(**batch).loss), rel=1e-5)
        assert layer.loss_without != pytest.approx(loss, rel=1e-4)  # each layer does something


def test_padding_and_labels_that_are_not_there():
    model, batch = adapted(positions="all"), prompts(5, 3, side="left")
    found = explain_edits(model, batch, quiet=True)
    columns = [(0, column) for column in range(5)] + [(1, 2), (1, 3), (1, 4)]
    assert [(token.row, token.column) for token in found.tokens] == columns
    edits = edits_of(model)
    by_hooks("llama", edits, [(row, column, 0) for row, column in columns], batch)
    for layer, edit in zip(found.layers, edits, strict=True):
        assert list(layer.sizes.values()) == pytest.approx(edit.sizes, rel=1e-4)
    assert found.loss is None and found.loss_of_base is None
    assert all(layer.loss_without is None for layer in found.layers)


def test_strength_scales_the_sizes():
    model, batch = adapted(layers_to_transform=[1]), labelled(9, prompt=6, seed=1)
    whole = explain_edits(model, batch, quiet=True).layers[0]
    model.set_scale("default", 0.5)
    half = explain_edits(model, batch, quiet=True).layers[0]
    assert list(half.sizes.values()) == pytest.approx([size / 2 for size in whole.sizes.values()], rel=1e-4)


def test_mixed_batches():
    model = adapted()
    model.add_adapter("one", ReftConfig(r=2, positions="l1", task_type="CAUSAL_LM", layers_to_transform=[1]))
    randomize(model, seed=5)
    model.eval()
    batch = prompts(5, 6, 4, side="left")
    found = explain_edits(model, {**batch, "adapter_names": ["one", "__base__", "default"]}, quiet=True)
    assert {(token.row, token.column) for token in found.layers[0].sizes} == {(2, c) for c in (2, 3, 4, 5)}
    assert {(token.row, token.column) for token in found.layers[1].sizes} == {(0, 5), *((2, c) for c in (2, 3, 4, 5))}


def test_encoder_decoder():
    """The tokens of both sides are told apart."""
    model = get_peft_model(
        build("t5"),
        ReftConfig(r=2, positions="f1", task_type="SEQ_2_SEQ_LM", target_modules=r"(encoder|decoder)\.block\.\d+"),
    )
    randomize(model)
    batch = {**prompts(5, 4), "labels": prompts(3, 3)["input_ids"]}
    found = explain_edits(model, batch, quiet=True)
    sides = {layer.name.split(".")[0]: {token.in_encoder for token in layer.sizes} for layer in found.layers}
    assert sides == {"encoder": {True}, "decoder": {False}}
    assert all((token.row, token.column) in ((0, 0), (1, 0)) for token in found.tokens)
    # The decoder reads the labels behind its start token, which T5 has at id 0.
    first = batch["input_ids"][:, 0].tolist()
    assert [token.text for token in found.tokens] == [*map(str, first), "0", "0"]


def test_each_forward_reads_the_cache_that_was_given():
    model, ids = adapted(positions="all"), prompts(9)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    batch = {"input_ids": ids[:, 4:], "labels": ids[:, 4:], "past_key_values": cache}
    found = explain_edits(model, batch, quiet=True)
    assert cache.get_seq_length() == 4
    model.set_scale("default", 0.0)
    with torch.no_grad():
        assert found.loss_of_base == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_the_model_is_left_as_it_was():
    model, batch = adapted(dropout=0.5), labelled(9, 7, prompt=4, seed=1)
    layers = layers_of(model)
    model.train()
    layers[1].base_layer.eval()
    layers[0].set_scale("default", 0.5)
    modes = [module.training for module in model.modules()]
    first = explain_edits(model, batch, quiet=True)
    assert [module.training for module in model.modules()] == modes
    assert [layer.scaling for layer in layers] == [{"default": 0.5}, {"default": 1.0}, {"default": 1.0}]
    assert not any(layer._forward_hooks or layer.base_layer._forward_hooks for layer in layers)
    assert explain_edits(model, batch, quiet=True) == first  # without dropout, though the model trains


def test_compiled_models_are_measured():
    torch.compiler.reset()
    model, batch = adapted(), labelled(9, 7, prompt=4, seed=1)
    plain = explain_edits(model, batch, quiet=True)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(**batch)
    found = explain_edits(compiled, batch, quiet=True)
    assert [list(layer.sizes.values()) for layer in found.layers] == [
        pytest.approx(list(layer.sizes.values()), rel=1e-4) for layer in plain.layers
    ]
    torch.compiler.reset()


def test_lists_and_texts_and_what_is_printed():
    words = tokenizer()
    model = get_peft_model(
        build("llama"), ReftConfig(r=2, positions="f1+l2", response_template=None, task_type="CAUSAL_LM")
    )
    randomize(model)
    ids = [90, 91, 92, 93]
    out = io.StringIO()
    found = explain_edits(model, {"input_ids": [ids], "attention_mask": [[1] * 4]}, words, file=out)
    assert [token.text for token in found.tokens] == [words.decode([ids[column]]) for column in (0, 2, 3)]
    heading, layer = out.getvalue().splitlines()[1:3], out.getvalue().splitlines()[3]
    assert heading[0].split() == ["0:0", "0:2", "0:3", "all"]
    assert layer.split() == [
        "model.layers.0",
        *(f"{size:.3f}" for size in found.layers[0].sizes.values()),
        f"{found.layers[0].mean:.3f}",
    ]
    assert "loss" not in out.getvalue()


def test_more_tokens_than_fit_beside_one_another():
    out = io.StringIO()
    found = explain_edits(adapted(positions="all"), labelled(13, prompt=4, seed=1), file=out)
    text = out.getvalue()
    assert len(found.tokens) == 13 and all(f"0:{column} " in text or f"0:{column}\n" in text for column in range(13))
    assert text.count("model.layers.2") == 2 and text.count("without") == 2  # a heading, and the last line
    assert f"{found.layers[2].loss_without:.4f}" in text
    assert f"loss {found.loss:.4f} with all edits, {found.loss_of_base:.4f} without any" in text


def test_what_can_not_be_explained_is_refused():
    batch = labelled(9, prompt=6, seed=1)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no ReFT adapter"):
        explain_edits(build("llama"), batch)
    model = adapted()
    with model.disable_adapter(), pytest.raises(ValueError, match="No ReFT adapter .* edits a token of this batch"):
        explain_edits(model, batch)
    merged = adapted(positions="all", target_modules=["down_proj"])
    merged.merge_adapter()
    with pytest.raises(ValueError, match="default: a merged adapter edits no hidden state"):
        explain_edits(merged, batch)


def drawn() -> ExplainedEdits:
    return explain_edits(adapted(), labelled(9, 7, prompt=4, seed=1), quiet=True)


@pytest.mark.parametrize("kind, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_heat_map_is_written(tmp_path, kind, begins):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    path = tmp_path / f"map.{kind}"
    draw_heat_map(drawn(), path, title="a title")
    assert path.read_bytes().startswith(begins)


def test_the_heat_map_shows_the_sizes(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="needs the extra `plot`")
    made = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: made.append(figure))
    found = drawn()
    draw_heat_map(found, tmp_path / "map.png")
    (sizes, losses, *_) = made[0].axes
    assert sizes.images[0].get_array().tolist() == [list(layer.sizes.values()) for layer in found.layers]
    assert [label.get_text() for label in sizes.get_yticklabels()] == [layer.name for layer in found.layers]
    rises = [bar.get_width() for bar in losses.patches]
    assert rises == pytest.approx([layer.loss_without - found.loss for layer in found.layers])


def test_pictures_that_can_not_be_drawn_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    with pytest.raises(ValueError, match=r"--plot .*map\.xyz: Format 'xyz' is not supported"):
        draw_heat_map(drawn(), tmp_path / "map.xyz")
    many = explain_edits(adapted(positions="all"), prompts(121), quiet=True)
    with pytest.raises(ValueError, match="121 edited tokens are too many for a picture"):
        draw_heat_map(many, tmp_path / "map.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"needs matplotlib, of the extra 'plot': pip install 'peft-reft\[plot\]'"):
        draw_heat_map(drawn(), tmp_path / "map.png")
