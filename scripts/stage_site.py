#!/usr/bin/env python3
"""Lays out the pages of the site in outputs/site, for `zensical build`. `make site` runs both.

docs/ and its README become the site's pages and its front page. A link to a file elsewhere in the repository leads to
a page as well: to the Markdown itself, to a notebook with its outputs, to a listing of the source, or to the list of a
folder's files. What those link to comes along. So no link leaves the site but those to other sites, which are not
looked up, and zensical's strict mode checks all others, anchors too. An error here names the file, the line and the
link: a file that is missing, or a page of docs/ that zensical.toml's nav lacks.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote


ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "outputs" / "site"
# A fence ends at the marks it began with. What follows the language is for the tests, and zensical does not know it.
FENCE = re.compile(r"^( *)(`{3,}|~{3,})[ ]*([\w+-]*)(.*)$")
CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#")  # another site, a mail address, or this page
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".jsonl": "json", ".toml": "toml"}
# "name (`type`, *optional*): " under Args, and "`type`, *optional*: " under Returns.
DOCUMENTED_TYPE = re.compile(r"^ +(?:\w[\w, ]* \(`.*?\)|`[^:]*`(?:, \*optional\*)?):(?=[ \n])", re.MULTILINE)
# An example under "Example:", which is indented as Args are, though it is no section of mkdocstrings'.
EXAMPLE = re.compile(r"(?<=Example:\n\n)(?: {8}.*\n|\n)+", re.MULTILINE)
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"


class BrokenSite(Exception):
    """What is wrong with the pages, a line for each fault."""


def first_pages(root: Path) -> list[Path]:
    """The Markdown that people read: docs/, that at the root, and the README of each example."""
    return sorted({*root.glob("docs/**/*.md"), *root.glob("*.md"), *root.glob("examples/**/*.md")})


def place(source: Path, root: Path) -> Path:
    """Where a file of the repository lies among the staged files. docs/ is their root, the rest lies in project/.

    zensical passes over names that begin with a dot, so those lose it."""
    path = source.relative_to(root)
    visible = [part.lstrip(".") for part in path.parts]
    path = Path(*visible[1:]) if path.parts[0] == "docs" else Path("project", *visible)
    if source.is_dir():
        return path / "index.md"
    if path.name == "README.md":
        return path.with_name("index.md")
    if path.suffix == ".md" or is_picture(path):
        return path
    return path.with_suffix(".md") if path.suffix == ".ipynb" else path.with_name(path.name + ".md")


def is_picture(path: Path) -> bool:
    return path.suffix in (".png", ".svg", ".jpg", ".gif")


def prose_lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """Lines of Markdown with their number, and whether they are prose: neither in a fence nor the fence itself."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        found = FENCE.match(line)
        if fence:
            yield number, line, False
            if found and found[2].startswith(fence) and not found[3] and not found[4].strip():
                fence = ""
        elif found:
            fence = found[2]
            yield number, f"{found[1]}{found[2]}{found[3]}", False
        else:
            yield number, line, True


def markdown_page(text: str, source: Path, root: Path, linked: list[Path], faults: list[str]) -> str:
    """A page's text with links as they are on the site. Files that it links to are added to `linked`, links to nothing
    to `faults`."""

    def on_site(number: int, link: re.Match[str]) -> str:
        target, _, anchor = link[2].partition("#")
        if ELSEWHERE.match(link[2]):
            return link[0]
        path = Path(os.path.normpath(source.parent / unquote(target)))
        if (path / "README.md").is_file():
            path /= "README.md"
        if not path.exists() or root not in path.parents:
            faults.append(f"{source.relative_to(root)}:{number}: {link[2]} leads to nothing in the repository.")
            return link[0]
        linked.append(path)
        relative = os.path.relpath(place(path, root), place(source, root).parent)
        return f"{link[1]}{relative}{'#' + anchor if anchor else ''}{link[3]}"

    lines = []
    for number, line, is_prose in prose_lines(text):
        if is_prose:
            # A link's text may be a code span, and a code span may look like a link: a mark stands for each span.
            spans = [span[0] for span in CODE_SPAN.finditer(line)]
            first, *rest = LINK.sub(functools.partial(on_site, number), CODE_SPAN.sub("\0", line)).split("\0")
            line = first + "".join(span + text for span, text in zip(spans, rest))
        lines.append(line)
    return "\n".join(lines) + "\n"


def notebook_page(source: Path) -> str:
    """A notebook as Markdown: its text, its code, and the text that the code printed."""
    parts = []
    for cell in json.loads(source.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif text:
            parts.append(fenced(text, "python"))
            printed = "".join(
                "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
                for output in cell["outputs"]
            )
            parts += [fenced(printed, "text")] if printed.strip() else []
    return "\n\n".join(parts) + "\n"


def fenced(text: str, language: str) -> str:
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def folder_page(source: Path, root: Path) -> str:
    """A folder without a README: its files, as links."""
    names = sorted(path.name for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
    return "\n".join([f"# {source.relative_to(root)}\n", *(f"- [{name}]({name})" for name in names)])


def listing_page(source: Path, root: Path) -> str:
    """A file of another kind, as it stands, under its path."""
    text = source.read_text()
    return f"{UNSEARCHED}# {source.relative_to(root)}\n\n{fenced(text, LANGUAGES.get(source.suffix, 'text'))}\n"


def stage(root: Path, pages: Path) -> set[Path]:
    """Writes all pages, and returns the files that they were made from. Raises BrokenSite for links to nothing."""
    waiting = first_pages(root)
    done: set[Path] = set()
    faults: list[str] = []
    while waiting:
        source = waiting.pop()
        if source in done:
            continue
        done.add(source)
        target = pages / place(source, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_picture(source):
            shutil.copyfile(source, target)
        elif source.is_dir():
            # Its page lies in the folder, and so its links are those of a file in there.
            text = markdown_page(folder_page(source, root), source / "README.md", root, waiting, faults)
            target.write_text(f"{UNSEARCHED}{text}")
        elif source.suffix in (".md", ".ipynb"):
            text = notebook_page(source) if source.suffix == ".ipynb" else source.read_text()
            target.write_text(markdown_page(text, source, root, waiting, faults))
        else:
            target.write_text(listing_page(source, root))
    if faults:
        raise BrokenSite("\n".join(faults))
    return done


def read_nav(root: Path) -> list:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((root / "zensical.toml").read_text())["project"]["nav"]


def pages_of(nav: list) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def check_nav(nav: list, sources: set[Path], root: Path) -> None:
    """Raises BrokenSite where the nav lacks a page of docs/ or names one that is not there."""
    named = list(pages_of(nav))
    staged = {str(place(source, root)) for source in sources}
    missing = {str(place(source, root)) for source in sources if source.parent == root / "docs"} - set(named)
    faults = [f"docs/{page} is in no list of nav in zensical.toml: add a line for it." for page in sorted(missing)]
    faults += [f"nav in zensical.toml names {page}, which is no page." for page in named if page not in staged]
    if faults:
        raise BrokenSite("\n".join(faults))


def stage_package(root: Path, target: Path) -> None:
    """The package as it is when installed, with integrations/ inside, for mkdocstrings to read. It imports nothing.

    PEFT's docstrings mark types as code, "r (`int`)". mkdocstrings sets types as code by itself, so the marks go. They
    indent their examples, which would be code for that alone, fences and all."""
    for folder, inside in (("peft_reft", "peft_reft"), ("integrations", "peft_reft/integrations")):
        for source in (root / folder).rglob("*.py"):
            copy = target / inside / source.relative_to(root / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = DOCUMENTED_TYPE.sub(lambda found: re.sub("[`*]", "", found[0]), source.read_text())
            copy.write_text(EXAMPLE.sub(lambda found: found[0].replace("\n        ", "\n    ")[4:], text))


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    try:
        sources = stage(ROOT, OUT / "pages")
        check_nav(read_nav(ROOT), sources, ROOT)
    except BrokenSite as error:
        sys.exit(str(error))
    stage_package(ROOT, OUT / "package")
    print(f"{len(sources)} files of the repository lie in {(OUT / 'pages').relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
