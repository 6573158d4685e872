"""Runs PEFT's own tests of tuners with ReFT in their matrices.

    python scripts/peft_suite.py CHECKOUT [--stand-ins] [arguments of pytest]

The checkout, or the unpacked source distribution, is that of the installed PEFT. Its tests need diffusers and scipy.
Its tests are copied to a temporary folder, where ReFT's configs are added to the matrices, and the tests of ReFT's
entries are run. Models come from the hub; with `--stand-ins` they are tiny random models of the same architectures,
made here, so that no hub is needed.

Failures are sorted into kinds. Two are by design (docs/upstream.md), and all others make the exit status 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest


FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)

IMPORT = "from peft_reft import ReftConfig\n"
# File -> line at which a matrix begins -> ReFT's entries in it.
MATRICES: dict[str, dict[str, str]] = {
    "test_config.py": {"ALL_CONFIG_CLASSES = (": "(ReftConfig, {}),"},
    "test_custom_models.py": {
        "TEST_CASES = [": """
    ("Vanilla MLP 1 ReFT", "MLP", ReftConfig, {"target_modules": "lin0", "positions": "all"}),
    ("Vanilla MLP 2 ReFT", "MLP", ReftConfig, {"target_modules": ["lin0"], "positions": "all"}),
    ("Vanilla MLP 3 ReFT", "MLP", ReftConfig, {"target_modules": ["lin1"], "r": 2, "positions": "all"}),
    ("Vanilla MLP 4 ReFT", "MLP", ReftConfig, {"target_modules": ["lin0", "lin1"], "r": 2, "positions": "all"}),
    ("Vanilla MLP 5 ReFT", "MLP", ReftConfig,
     {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "positions": "all"}),
    ("Vanilla MLP 6 ReFT", "MLP", ReftConfig,
     {"target_modules": ["lin0"], "intervention": "nodireft", "positions": "all"}),
    # The output of conv1d has width 1, where an orthonormal R is 1 or -1 and has nowhere to move to.
    ("Embedding + transformers Conv1D 1 ReFT", "EmbConv1D", ReftConfig,
     {"target_modules": ["conv1d"], "r": 1, "intervention": "noreft", "positions": "all"}),
""",
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [": """
    ("ReFT Same", "reft", ReftConfig,
     {"target_modules": ["lin0"], "positions": "all", "init_weights": False},
     {"target_modules": ["lin0"], "positions": "all", "init_weights": False}),
    ("ReFT Different", "reft", ReftConfig,
     {"target_modules": ["lin0"], "positions": "all", "init_weights": False},
     {"target_modules": ["lin1"], "r": 2, "positions": "all", "init_weights": False}),
""",
        "MIXED_ADAPTER_TEST_CASES = [": """
    ("ReFT mixed adapter",
     ReftConfig(target_modules=["lin0"], positions="all", init_weights=False),
     ReftConfig(target_modules=["lin0"], r=16, positions="all", init_weights=False)),
""",
    },
    "test_decoder_models.py": {
        "ALL_CONFIGS = [": """
    (ReftConfig, {"task_type": "CAUSAL_LM"}),
    # Without b, which becomes a bias of a linear layer that has none. The class of the base would not load that.
    (ReftConfig, {"task_type": "CAUSAL_LM", "positions": "all", "target_modules": "all-linear", "add_bias": False}),
"""
    },
    "test_encoder_decoder_models.py": {"ALL_CONFIGS = [": '(ReftConfig, {"task_type": "SEQ_2_SEQ_LM"}),'},
    "test_feature_extraction_models.py": {"ALL_CONFIGS = [": '(ReftConfig, {"task_type": "FEATURE_EXTRACTION"}),'},
    "test_seq_classifier.py": {"ALL_CONFIGS = [": '(ReftConfig, {"task_type": "SEQ_CLS"}),'},
}

# Kind of failure that is by design -> what its error says.
BY_DESIGN = {
    "an edit of chosen positions is no change of a weight": (
        r"NotImplementedError: The adapter '.*' can't be merged: it edits hidden states at chosen positions"
    ),
    "a training batch without labels does not say where its prompts end": (
        r"ValueError: .*a training batch without labels does not say"
    ),
}

LORA = "peft-internal-testing/tiny-opt-lora-revision"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
}
# The name of a model in PEFT's tests -> class and config of its stand-in.
STAND_INS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        "OPTConfig",
        {"ffn_dim": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "vocab_size": 1024},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024}),
    "hf-internal-testing/tiny-random-gpt2": (
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM", "GPTJConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 1024}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (
        "MistralForCausalLM", "MistralConfig", {**SMALL, "num_key_value_heads": 2}),
    "peft-internal-testing/tiny-dummy-qwen2": (
        "Qwen2ForCausalLM", "Qwen2Config", {**SMALL, "num_key_value_heads": 2}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**SMALL, "num_key_value_heads": 2, "head_dim": 8}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration", "T5Config",
        {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 1024,
         "decoder_start_token_id": 0}),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration", "BartConfig",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 1024}),
    **{
        f"peft-internal-testing/tiny-random-{kind}{head}": (f"{kind}{head}", f"{kind}Config", SMALL)
        for kind in ("Bert", "Roberta", "Deberta", "DebertaV2")
        for head in ("Model", "ForSequenceClassification")
    },
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification", "LlamaConfig", {**SMALL, "pad_token_id": 0}),
}  # fmt: skip


class Kinds:
    """A plugin of pytest that sorts the failures."""

    def __init__(self) -> None:
        self.passed = 0
        self.by_design: Counter[str] = Counter()
        self.others: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Any:
        report = yield
        if report.outcome == "failed":
            error = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"
            kind = next((kind for kind, text in BY_DESIGN.items() if re.search(text, error)), None)
            if kind is None:
                self.others.append(f"{item.name}: {error.splitlines()[0][:300]}")
            else:
                self.by_design[f"{kind} ({item.originalname})"] += 1  # type: ignore[attr-defined]
                report.outcome, report.wasxfail = "skipped", f"by design: {kind}"
        elif report.when == "call" and report.outcome == "passed":
            self.passed += 1
        return report


def copy_tests(checkout: Path, folder: Path, stand_ins: bool) -> list[str]:
    """Copy PEFT's tests, with ReFT in their matrices. Returns the files to run."""
    tests = Path(shutil.copytree(checkout / "tests", folder / "tests"))
    (tests / "__init__.py").touch()
    # Without PEFT's own `src` beside them, the tests import the installed PEFT.
    names = dict.fromkeys(STAND_INS) if stand_ins else {}
    for file in FILES:
        text = (tests / file).read_text()
        for line, entries in MATRICES[file].items():
            if f"\n{line}\n" not in text:
                raise SystemExit(f"{file} of this PEFT has no line {line!r}: MATRICES in this script is out of date.")
            text = text.replace(f"\n{line}\n", f"\n{line}\n    {entries.strip()}\n", 1)
        text = text.replace("\nimport pytest\n", f"\nimport pytest\n{IMPORT}", 1)
        if stand_ins:
            text = text.replace(f'"{LORA}"', repr(make_lora(folder / "models" / "lora")))
        for name in names:
            if f'"{name}"' in text:
                names[name] = names[name] or make_stand_in(name, folder / "models")
                text = text.replace(f'"{name}"', f'"{names[name]}"')
        (tests / file).write_text(text)
    return [str(tests / file) for file in FILES]


def make_lora(folder: Path) -> str:
    """Save a LoRA adapter, in place of the one on the hub that PEFT's tests of configs load."""
    from peft import LoraConfig

    LoraConfig(task_type="CAUSAL_LM").save_pretrained(str(folder))
    return str(folder)


def make_stand_in(name: str, folder: Path) -> str:
    """Save a tiny random model of the architecture of a model on the hub. Returns where."""
    import torch
    import transformers

    model_class, config_class, settings = STAND_INS[name]
    torch.manual_seed(0)
    path = folder / name.replace("/", "_")
    getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).save_pretrained(path)
    return str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--stand-ins", action="store_true", help="make tiny random models, and reach no hub")
    options, rest = parser.parse_known_args()
    kinds = Kinds()
    with tempfile.TemporaryDirectory() as folder:
        files = copy_tests(options.checkout, Path(folder), options.stand_ins)
        selection = [] if any(argument.startswith("-k") for argument in rest) else ["-k", "reft or ReFT or Reft"]
        common = ["-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", folder, "-c", "/dev/null", "--tb=short"]
        pytest.main([*common, *selection, *rest, *files], plugins=[kinds])
    print(f"\nPEFT {version('peft')}: {kinds.passed} passed")
    for kind, count in sorted(kinds.by_design.items()):
        print(f"  by design, {count}: {kind}")
    for other in kinds.others:
        print(f"  FAILED {other}")
    return 1 if kinds.others or not kinds.passed else 0


if __name__ == "__main__":
    sys.exit(main())
