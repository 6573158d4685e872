#!/usr/bin/env python3
"""Draws docs/images/layout.svg: the folders of the package, who imports whom, and the road of one forward.

    python scripts/draw_layout.py

`FOLDERS` is what is drawn, and what a test compares with the folders as they are. Plain SVG, no dependency.
"""

from __future__ import annotations

from html import escape
from pathlib import Path


TARGET = Path(__file__).parents[1] / "docs" / "images" / "layout.svg"

# Folder of peft_reft/ to its modules, __init__.py apart. Three folders lie beside the package: integrations, and those
# whose names begin with peft_reft_.
FOLDERS: dict[str, tuple[str, ...]] = {
    "tuner": (
        "config",
        "model",
        "layer",
        "targets",
        "layouts",
        "merging",
        "strength",
        "nested",
        "chat_template",
        "card",
        "rules",
        "peft_type",
        "peft_api",
        "engines_api",
        "versions",
    ),
    "tuner/forward": (
        "context",
        "in_use",
        "selector",
        "generation",
        "plan",
        "mixed",
        "probe",
        "checkpointing",
        "graphs",
        "reuse",
        "saving",
        "transformers_api",
    ),
    "tuner/parameters": ("bases", "distributed", "stacked", "loading"),
    "tuner/positions": (
        "spec",
        "prompts",
        "template",
        "batch",
        "selection",
        "subspaces",
        "notices",
        "unedited",
        "deferred_checks",
    ),
    "tuner/interventions": ("formulas", "apply", "orthogonal"),
    "tools": (
        "collator",
        "explain",
        "explain_edits",
        "formats",
        "heat_map",
        "inspect_adapter",
        "log_edits",
        "measure",
        "resuming",
        "strength",
        "trainers",
    ),
    "conversion": (
        "from_pyreft",
        "to_pyreft",
        "from_adapters",
        "checkpoint",
        "base_model",
        "pyvene_places",
        "householder",
        "files",
    ),
    "evaluation": (
        "tasks",
        "data",
        "models",
        "generate",
        "classify",
        "scores",
        "evaluate",
        "report",
        "extras",
    ),
    "integrations": ("axolotl/", "lm_eval", "vllm/"),
    "peft_reft_autoload": ("run",),
    "peft_reft_cli": ("options", "positions", "inspect", "evaluation", "convert", "environment", "__main__"),
}
# What a folder is for, in a line.
PURPOSES = {
    "tuner": "what a PEFT tuner is: settings, wrapping, the layer",
    "tuner/forward": "one call of the model → one plan",
    "tuner/parameters": "trained weights → weights ready to use",
    "tuner/positions": "which tokens: tensors only",
    "tuner/interventions": "what is done to them: tensors only",
    "tools": "around training",
    "conversion": "checkpoints of peers",
    "evaluation": "the paper's tasks",
    "integrations": "training and serving",
    "peft_reft_autoload": "import peft brings ReFT; peft-reft run",
    "peft_reft_cli": "the console command: --help imports nothing large",
}
# What a forward does, and in which folder. The last three happen in every layer.
ROAD = (
    ("batch", "ids, mask, labels", ""),
    ("Selection", "which tokens", "positions"),
    ("plan", "rows and weights", "forward"),
    ("gather", "h of those rows", "interventions"),
    ("coefficients", "act(Wh + b) − Rh", "interventions"),
    ("add back", "h + Rᵀ · coefficients", "interventions"),
)

WIDTH, HEIGHT = 960, 826
INK, QUIET, LINE = "#1f2933", "#52606d", "#7b8794"
COLOURS = {"above": "#eef2f7", "tuner": "#f6f8fa", "inner": "#ffffff", "tensors": "#e6f4ea", "road": "#fff7e0"}


def text(
    x: float, y: float, words: str, size: int = 13, weight: int = 400, colour: str = INK, anchor: str = "start"
) -> str:
    """A line of text, its baseline at y."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A rounded frame."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" stroke="{LINE}" '
        'stroke-width="1"/>'
    )


def arrow(*points: tuple[float, float]) -> str:
    """A line with straight pieces that ends in a head."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{QUIET}" stroke-width="1.6" marker-end="url(#head)"/>'


def lines_of(names: tuple[str, ...], width: float, size: int) -> list[str]:
    """Names, as many a line as fit."""
    room = int(width / (0.58 * size))
    lines = [""]
    for name in names:
        longer = f"{lines[-1]}, {name}" if lines[-1] else name
        if len(longer) > room:
            lines[-1] += ","
            lines.append(name)
        else:
            lines[-1] = longer
    return lines


def folder(name: str, x: float, y: float, width: float, height: float, fill: str) -> list[str]:
    """A folder: its name, its purpose, its modules."""
    drawn = [
        box(x, y, width, height, fill),
        text(x + 12, y + 22, f"{name.split('/')[-1]}/", 15, 700),
        text(x + 12, y + 40, PURPOSES[name], 12, 400, QUIET),
    ]
    for index, line in enumerate(lines_of(FOLDERS[name], width - 24, 12)):
        drawn.append(text(x + 12, y + 60 + 16 * index, line, 12))
    return drawn


def folders() -> list[str]:
    """The upper part: who imports whom, always downwards."""
    drawn = folder("integrations", 20, 16, 170, 70, COLOURS["above"])
    drawn += folder("peft_reft_autoload", 210, 16, 240, 70, COLOURS["above"])
    drawn += folder("peft_reft_cli", 470, 16, 470, 70, COLOURS["above"])
    for index, name in enumerate(("tools", "conversion", "evaluation")):
        x = 20 + 310 * index
        drawn += folder(name, x, 112, 300, 112, COLOURS["above"])
        drawn += [arrow((x + 150, 86), (x + 150, 110)), arrow((x + 150, 224), (x + 150, 248))]
    # the tuner and the folders in it
    drawn += [box(20, 250, 920, 404, COLOURS["tuner"]), text(32, 273, "tuner/", 15, 700)]
    closed = "could be src/peft/tuners/reft as it stands: imports nothing of peft_reft outside itself"
    drawn += [text(90, 273, closed, 12, 400, QUIET)]
    drawn += [box(36, 286, 888, 56, COLOURS["inner"]), text(48, 308, PURPOSES["tuner"], 12, 400, QUIET)]
    drawn += [text(48, 329, ", ".join(FOLDERS["tuner"]), 12)]
    drawn += folder("tuner/forward", 36, 368, 888, 74, COLOURS["inner"])
    drawn += folder("tuner/positions", 36, 468, 430, 174, COLOURS["tensors"])
    drawn += folder("tuner/parameters", 494, 468, 430, 74, COLOURS["inner"])
    drawn += folder("tuner/interventions", 494, 568, 430, 74, COLOURS["tensors"])
    drawn += [
        arrow((480, 342), (480, 366)),
        arrow((250, 442), (250, 466)),
        arrow((710, 442), (710, 466)),
        arrow((710, 542), (710, 566)),
    ]
    return drawn


def road() -> list[str]:
    """The lower part: one forward, from left to right."""
    top, width, gap = 706, 134, 20
    drawn = [text(20, top - 20, "One forward", 15, 700)]
    layers = 20 + 3 * (width + gap) - 8
    drawn += [
        f'<rect x="{layers:g}" y="{top - 8}" width="{3 * width + 2 * gap + 16:g}" height="110" rx="8" fill="none" '
        f'stroke="{LINE}" stroke-dasharray="5 4"/>',
        text(layers + 8, top + 96, "in every edited layer: interventions/apply.py, top to bottom", 12, 400, QUIET),
    ]
    for index, (name, what, where) in enumerate(ROAD):
        x = 20 + index * (width + gap)
        drawn += [box(x, top, width, 72, COLOURS["road"]), text(x + width / 2, top + 24, name, 14, 700, INK, "middle")]
        drawn.append(text(x + width / 2, top + 42, what, 11, 400, INK, "middle"))
        if where:
            drawn.append(text(x + width / 2, top + 60, f"{where}/", 11, 400, QUIET, "middle"))
        if index:
            drawn.append(arrow((x - gap, top + 36), (x - 2, top + 36)))
    return drawn


def picture() -> str:
    """The whole picture, as SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif">'
    )
    title = "<title>The folders of peft-reft, who imports whom, and the road of one forward</title>"
    marker = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{QUIET}"/></marker></defs>'
    )
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    return "\n".join([head, title, marker, ground, *folders(), *road(), "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture())
    print(f"wrote {TARGET.relative_to(Path.cwd()) if TARGET.is_relative_to(Path.cwd()) else TARGET}")
