"""`peft-reft inspect`: how much an adapter's edits change texts, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .evaluation import Dtype
from .options import Json, Template, check_file, check_model, encode_dataset, naming, print_json


def inspect(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder or hub name.")],
    base: Annotated[
        str | None, typer.Option(help="The base's folder or hub name. Left out: the one that the adapter names.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A prompt. May be given several times.")] = None,
    answer: Annotated[
        list[str] | None, typer.Option(help="The answer to a prompt, to compute losses. One for each --text, or none.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each --text is a user's message, put into the chat template.")
    ] = False,
    dataset: Annotated[Path | None, typer.Option(help="A file of examples: JSON lines, or a JSON list.")] = None,
    template: Template = None,
    examples: Annotated[int, typer.Option(min=1, help="How many rows of the dataset to read.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="A picture to write: .png, .svg or .pdf. Needs matplotlib.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="The dtype that the base is loaded in.")] = Dtype.float32,
    as_json: Json = False,
) -> None:
    """Show how much an adapter changes texts.

    For each layer and edited token the size of the edit relative to the hidden state and, where answers are given,
    the loss with the layer's edits off.
    """
    if bool(text) == (dataset is not None):
        raise ValueError("Give either --text 'a prompt', as often as you like, or --dataset file.jsonl.")
    check_file("--dataset", dataset)
    if dataset is not None and (answer or chat):
        raise ValueError("--answer and --chat are about --text. Rows of --dataset have answers of their own.")
    if plot is not None and not plot.parent.is_dir():
        raise ValueError(f"--plot {plot}: there is no folder {plot.parent}.")
    check_model("ADAPTER", adapter, "adapter_config.json")
    if base is not None:
        check_model("--base", base)
    from transformers import AutoTokenizer

    from peft_reft.tools.heat_map import draw_heat_map
    from peft_reft.tools.inspect_adapter import check_answers, inspect_adapter, read_config, rows_of_texts, task_of

    config = read_config(adapter)
    task, name = task_of(config), base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter} does not name its base model. Give it with --base.")
    option = "--base" if base else f"{adapter}, without --base, names"
    check_model(option, name)
    with naming(option, name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if dataset is None:
        rows = rows_of_texts(text or [], answer or [], chat, tokenizer, task)
    else:
        rows, _ = encode_dataset(dataset, examples, template, tokenizer, as_json)
        if any("labels" in row for row in rows):
            check_answers(task, f"--dataset {dataset}")
    explained = inspect_adapter(adapter, name, rows, tokenizer, dtype.value, quiet=as_json)
    if as_json:
        print_json(explained.as_json())
    if plot is not None:
        draw_heat_map(explained, plot, title=f"{Path(adapter).name} on {Path(name).name}")
        typer.echo(f"wrote {plot}", err=as_json)
