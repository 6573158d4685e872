"""Shows answers to unseen prompts by a base model and by the same model with a ReFT adapter, side by side.

The prompts are not in the training data. Both answers are greedy, so a run can be repeated. One model is in memory:
for the base's answers, PEFT's `disable_adapter` switches the adapter off.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import peft_reft  # noqa: F401  (registers ReFT with PEFT)


UNSEEN_PROMPTS = [
    "What is the capital of Japan?",
    "How do I boil an egg?",
    "What do bees make?",
    "Who was Albert Einstein?",
    "Give me a tip for sleeping better.",
    "What is the largest ocean?",
    "I am nervous about my job interview.",
    "Why should I read books?",
]


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(device)
    model = PeftModel.from_pretrained(base, args.adapter).eval()

    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{args.base} before and after {args.adapter}", show_lines=True)
    for heading, style in (("prompt", "bold"), ("base model", "dim"), ("with the LoReFT adapter", "green")):
        table.add_column(heading, style=style, ratio=1 if heading == "prompt" else 2)
    without = answer(model, tokenizer, args.prompts, args.max_new_tokens, adapter=False)
    with_it = answer(model, tokenizer, args.prompts, args.max_new_tokens, adapter=True)
    for row in zip(args.prompts, without, with_it):
        table.add_row(*row)
    console.print(table)
    console.print(describe_size(model, args.adapter))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("outputs/SmolLM2-135M-Instruct"), help="base model's folder")
    parser.add_argument("--adapter", type=Path, default=Path("outputs/quickstart"), help="adapter's folder")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer, in tokens (default: 48)")
    parser.add_argument(
        "prompts", nargs="*", default=UNSEEN_PROMPTS, help="your own prompts instead of the built-in ones"
    )
    args = parser.parse_args()
    for folder, file, remedy in (
        (args.base, "config.json", "python examples/prepare_smollm2.py"),
        (args.adapter, "adapter_config.json", "axolotl train examples/quickstart.yaml"),
    ):
        if not (folder / file).is_file():
            parser.error(f"{folder} has no {file}. Make it with `{remedy}`, or do everything with `make quickstart`.")
    return args


@torch.inference_mode()
def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int, adapter: bool
) -> list[str]:
    """Greedy answers to all prompts, as one batch."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    with nullcontext() if adapter else model.disable_adapter():
        tokens_BS = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    answers_BT = tokens_BS[:, batch["input_ids"].shape[1] :]
    return [
        " ".join(text.split()) + ("" if tokenizer.eos_token_id in tokens else " ...")
        for text, tokens in zip(tokenizer.batch_decode(answers_BT, skip_special_tokens=True), answers_BT.tolist())
    ]


def describe_size(model: PeftModel, adapter_dir: Path) -> str:
    """The adapter's size on disk, and its parameters beside the base model's."""
    adapter = sum(parameter.numel() for name, parameter in model.named_parameters() if ".reft_" in name)
    base = sum(parameter.numel() for parameter in model.parameters()) - adapter
    kilobytes = (adapter_dir / "adapter_model.safetensors").stat().st_size / 1000
    return (
        f"The adapter: {kilobytes:,.0f} KB, {adapter:,} parameters, {adapter / base:.2%} of the base model's {base:,}."
    )


if __name__ == "__main__":
    main()
