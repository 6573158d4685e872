"""Measures the cost of ReFT beside that of the frozen base model, LoRA and other libraries."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from .accuracy import TASKS, Runs, collect, table
from .log_edits import log_edits
from .methods import Setting
from .pairs import Ratio, Worker, WorkerError
from .report import markdown_table, plot_scaling, print_table, ratio_text, slope
from .serving import serve
from .session import OUT, Device, Out, Pairs, Session, Size, Threads, interleave_shown
from .startup import cli


app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(cli)
app.command()(log_edits)

Pyreft = Annotated[str | None, typer.Option(help="interpreter of an environment with pyreft")]
Adapters = Annotated[str | None, typer.Option(help="interpreter of an environment with adapters")]


def measure_steps(session: Session, setting: Setting, pairs: int, methods: list[str]) -> dict[str, Any]:
    """Time training steps: each of a method is paired with one of the frozen base in the same process."""
    with ExitStack() as stack:
        workers = {name: session.own for name in methods if name not in session.peers}
        peers = {name: stack.enter_context(_peer(session, name)) for name in methods if name in session.peers}
        workers.update(peers)
        described = asdict(setting)
        trainable = {}
        runs = {}
        bases = {
            name: f"frozen for {name}" if name in peers else "frozen" for name in methods
        }  # each in the process of its method
        for name, base in bases.items():
            if base not in runs:
                workers[name].ask("build", name=base, method="frozen", setting=described)
                runs[base] = _run(workers[name], "step", base)
        for name in methods:
            trainable[name] = workers[name].ask("build", name=name, method=name, setting=described)["trainable"]
            runs[name] = _run(workers[name], "step", name)
        seconds = interleave_shown(runs, pairs, "steps")
        found: dict[str, Any] = {
            name: Ratio.of(seconds[name], seconds[bases[name]]).as_dict() | {"trainable": trainable[name]}
            for name in methods
        }
        found["frozen"] = Ratio.of(seconds["frozen"], seconds["frozen"]).as_dict()
        for name in ["frozen", *methods]:
            if name not in peers:
                session.own.ask("drop", name=name)
        for name, worker in peers.items():
            session.results.setdefault("peer versions", {})[name] = worker.ask("versions")
    return found


def _peer(session: Session, name: str) -> Worker:
    return Worker(session.peers[name], session.threads, session.out / "workers.log")


def _run(worker: Worker, do: str, name: str, **arguments: Any) -> Any:
    return lambda: worker.ask(do, name=name, **arguments)["seconds"]


@app.command()
def step(
    pairs: Pairs = 60,
    out: Out = OUT,
    threads: Threads = 1,
    device: Device = "cpu",
    size: Size = "deep",
    pyreft: Pyreft = None,
    adapters: Adapters = None,
) -> None:
    """A training step and its peak memory: ReFT, LoRA and other libraries against the frozen base."""
    with Session(out, threads, pyreft, adapters) as session:
        setting = Setting(size=size, device=device, dtype="float32" if device == "cpu" else "bfloat16")
        methods = ["reft", "sketch", "lora", *session.peers]
        session.results["step"] = found = measure_steps(session, setting, pairs, methods)
        peaks = {}
        for name in ("frozen", "reft", "lora"):
            session.own.ask("build", name=name, method=name, setting=asdict(setting))
            peaks[name] = session.own.ask("peak", name=name)["bytes"]
            session.own.ask("drop", name=name)
        session.results["peak"] = peaks
        rows = [
            [
                name,
                f"{1e3 * found[name]['seconds']:.1f}",
                ratio_text(found[name]),
                f"{peaks[name] / 2**20:.1f} MiB, {peaks[name] / peaks['frozen']:.3f}" if name in peaks else "",
                str(found[name].get("trainable", 0)),
            ]
            for name in ("frozen", *methods)
        ]
        print_table(
            "training step", ["method", "ms", "to the frozen base", "peak memory, to the base's", "trained"], rows
        )
        session.save("step")


@app.command()
def inference(
    pairs: Pairs = 40,
    out: Out = OUT,
    threads: Threads = 1,
    device: Device = "cpu",
    size: Size = "deep",
    tokens: Annotated[int, typer.Option(help="tokens to generate")] = 32,
    rows: Annotated[int, typer.Option(help="prompts at once")] = 8,
) -> None:
    """Prefill, decode steps, loading, switching, and the size of the adapter."""
    with Session(out, threads) as session:
        setting = asdict(Setting(size=size, device=device, dtype="float32" if device == "cpu" else "bfloat16"))
        names = ("frozen", "reft", "sketch", "lora")
        runs = {}
        for name in names:
            session.own.ask("build", name=name, method=name, setting=setting)
            runs[name, 1] = _run(session.own, "generate", name, tokens=1, rows=rows)
            runs[name, tokens] = _run(session.own, "generate", name, tokens=tokens, rows=rows)
        seconds = interleave_shown(
            {f"{name} {count}": run for (name, count), run in runs.items()}, pairs, "generating"
        )
        prefill = {name: seconds[f"{name} 1"] for name in names}
        decode = {
            name: [(whole - first) / (tokens - 1) for whole, first in zip(seconds[f"{name} {tokens}"], prefill[name])]
            for name in names
        }
        found = {
            name: {
                "prefill": Ratio.of(prefill[name], prefill["frozen"]).as_dict(),
                "decode": Ratio.of(decode[name], decode["frozen"]).as_dict(),
                **({} if name in ("frozen", "sketch") else session.own.ask("load_and_switch", name=name)),
            }
            for name in names
        }
        session.results["inference"] = found
        lines = [
            [
                name,
                f"{1e3 * one['prefill']['seconds']:.2f} ms, {ratio_text(one['prefill'])}",
                f"{1e3 * one['decode']['seconds']:.2f} ms, {ratio_text(one['decode'])}",
                f"{1e3 * one['load_seconds']:.0f} ms" if "load_seconds" in one else "",
                f"{1e3 * one['switch_seconds']:.2f} ms" if "switch_seconds" in one else "",
                f"{one['bytes'] / 1024:.0f} KiB" if "bytes" in one else "",
            ]
            for name, one in found.items()
        ]
        print_table(
            f"inference, {rows} row(s)",
            ["method", "prefill of 96 tokens", "decode step", "load", "switch", "size"],
            lines,
        )
        session.save(f"inference-{size}-{rows}")


SCALES: dict[str, tuple[str, list[Any]]] = {
    "rank": ("rank", [1, 4, 16, 64]),
    "positions": ("positions", ["f1+l1", "f7+l7", "f16+l16", "f32+l32"]),
    "edited layers": ("layers", [1, 8, 16, 32]),
    "unedited layers": ("base_layers", [2, 8, 16, 32]),
    "tokens of a row": ("length", [64, 128, 256, 512]),
}


@app.command()
def scaling(
    pairs: Pairs = 30,
    out: Out = OUT,
    threads: Threads = 1,
    device: Device = "cpu",
    vary: Annotated[list[str], typer.Option(help="what to vary; several times for several")] = list(SCALES),  # noqa: B006
) -> None:
    """Step cost by rank, positions, layers and length, with plots, and the cost that one more of each adds."""
    with Session(out, threads) as session:
        found: dict[str, list[dict[str, Any]]] = {}
        for name in vary:
            field, values = SCALES[name]
            found[name] = []
            for value in values:
                setting, methods = Setting(device=device), ["reft", "lora"]
                if field == "layers":
                    # The lowest layers: backward then goes through all layers, as it does in the base.
                    setting.layers = list(range(value))
                elif field == "base_layers":  # of these layers the first two are edited
                    setting.base_layers, setting.layers, methods = value, [0, 1], ["reft"]
                elif field == "length":
                    setting.length, setting.prompt, setting.batch = value, value * 3 // 4, max(1, 1024 // value)
                else:
                    setattr(setting, field, value)
                number = value if isinstance(value, int) else sum(setting.first_and_last)
                if field == "base_layers":
                    number = value - 2
                measured = measure_steps(session, setting, pairs, methods)
                found[name] += [
                    {"method": method, "value": number, "base_seconds": measured["frozen"]["seconds"]}
                    | measured[method]
                    for method in methods
                ]
        session.results["scaling"] = found
        rows = []
        for name, points in found.items():
            own = [point for point in points if point["method"] == "reft"]
            added = [{"value": p["value"], "ratio": 1e3 * (p["seconds"] - p["base_seconds"])} for p in own]
            _, gradient = slope(added)
            costs = ", ".join(f"{p['value']}: {p['ratio']:.3f}" for p in own)
            rows.append([name, costs, f"{gradient:+.3f} ms"])
        print_table("ReFT's step to the frozen base's", ["varied", "value: ratio", "one more adds"], rows)
        session.save("scaling" if len(vary) == len(SCALES) else "scaling-" + "-".join(vary).replace(" ", "-"))
        for path in plot_scaling(found, out):
            typer.echo(f"Written: {path}")


@app.command()
def learning(
    data: Annotated[
        list[Path], typer.Option(help="a file of examples, as LLM-Adapters has them; several times for several")
    ],
    base: Annotated[str, typer.Option(help="folder or hub name of a causal language model")],
    out: Out = OUT,
    threads: Threads = 1,
    seeds: Annotated[int, typer.Option(help="how many seeds")] = 3,
    examples: Annotated[int, typer.Option(help="examples of one epoch")] = 300,
    rank: Annotated[int, typer.Option(help="of the edit")] = 8,
    rate: Annotated[float, typer.Option(help="learning rate")] = 2e-3,
    way: Annotated[str, typer.Option(help="ours, householder, or both")] = "both",
) -> None:
    """Training loss with R kept orthonormal by retraction (ours), and by torch's Householder parametrization."""
    import torch

    from .learning import train

    torch.set_num_threads(threads)
    ways = ["ours", "householder"] if way == "both" else [way]
    with Session(out, threads) as session:
        session.results["learning"] = found = []
        for seed in range(seeds):
            for one in ways:
                run = train(one, base, data, seed=seed, examples=examples, rank=rank, rate=rate, tokens=7, batch=4)
                tail = run["losses"][-max(1, len(run["losses"]) // 5) :]
                found.append({"way": one, "seed": seed, "final": sum(tail) / len(tail), **run})
                typer.echo(f"seed {seed}, {one}: {found[-1]['final']:.4f}, R Rᵀ − I {run['off']:.1e}")
        rows = [[f"{r['way']}", str(r["seed"]), f"{r['losses'][0]:.3f}", f"{r['final']:.4f}"] for r in found]
        print_table("loss", ["R", "seed", "first step", "mean of the last fifth"], rows)
        session.save(f"learning-{way}")


@app.command()
def parameters(out: Out = OUT) -> None:
    """Parameters of adapters in the paper's settings, beside the paper's percentages. Takes seconds and no memory."""
    from .parameters import count, published, table

    with Session(out, threads=1) as session:
        session.results["parameters"] = found = [count(row) for row in published()]
        console = Console(width=None if sys.stdout.isatty() else 160)
        print_table("adapters in the paper's settings", *table(found), console=console)
        session.save("parameters")


@app.command()
def accuracy(
    data: Annotated[Path, typer.Option(help="folder with the tasks' files")],
    base: Annotated[
        str, typer.Option(help="folder or hub name of the language model")
    ] = "outputs/SmolLM2-135M-Instruct",
    encoder: Annotated[str, typer.Option(help="folder or hub name of the encoder")] = "outputs/MiniLM-L6",
    task: Annotated[list[str], typer.Option(help="a task; several times for several")] = list(TASKS),  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="a seed; several times for several")] = [1, 2, 3],  # noqa: B006
    out: Annotated[
        Path, typer.Option(help="folder for all that is made; runs that are there are not repeated")
    ] = Path("outputs/accuracy"),
    threads: Threads = 1,
) -> None:
    """Train and score base, LoRA and LoReFT by the smol recipes of examples/. Needs the stack axolotl."""
    runs = Runs(data, base, encoder, out, threads)
    with Progress() as progress:
        bar = progress.add_task("runs", total=len(task) * len(seed))
        for one_seed in seed:
            for one in task:
                progress.update(bar, description=f"{one}, seed {one_seed}")
                runs.run(one, one_seed)
                progress.advance(bar)
    rows = collect(out)
    columns, lines = table(rows)
    print_table("accuracy", columns, lines)
    (out / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "accuracy.md").write_text(markdown_table(columns, lines) + "\n")


app.command()(serve)


@app.command()
def gpu(
    pairs: Pairs = 30,
    out: Out = OUT,
    batch: Annotated[int, typer.Option(help="rows of a batch")] = 8,
    length: Annotated[int, typer.Option(help="tokens of a row")] = 1024,
    flash: Annotated[bool, typer.Option(help="flash attention too; needs the package flash-attn")] = False,
) -> None:
    """On a GPU: one billion random weights in bfloat16, with and without checkpointing, packed, and in 4 bits."""
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "gradient checkpointing": {"checkpointing": True},
        "packed": {"packed": True},
        "4 bits": {"four_bit": True},
    }
    if flash:
        kinds |= {"flash": {"attention": "flash_attention_2"}}
        kinds |= {"flash, packed": {"attention": "flash_attention_2", "packed": True}}
    with Session(out, threads=4) as session:
        rows, session.results["gpu"] = [], {}
        for name, given in kinds.items():
            setting = Setting(
                size="1b",
                batch=batch,
                length=length,
                prompt=length * 3 // 4,
                device="cuda",
                dtype="bfloat16",
                **given,
            )
            try:
                found = measure_steps(session, setting, pairs, ["reft", "lora"])
            except WorkerError as error:
                typer.echo(f"{name}: {error}")
                continue
            session.results["gpu"][name] = found
            rows.append(
                [
                    name,
                    f"{1e3 * found['frozen']['seconds']:.1f}",
                    ratio_text(found["reft"]),
                    ratio_text(found["lora"]),
                ]
            )
        print_table(
            "training step, one billion weights", ["kind", "frozen base, ms", "ReFT to it", "LoRA to it"], rows
        )
        session.save("gpu")


if __name__ == "__main__":
    app()
