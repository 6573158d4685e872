"""scripts/stage_site.py: which pages the site has, and what is wrong with a link. `make site` builds the whole."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY

import peft_reft


spec = importlib.util.spec_from_file_location("stage_site", REPOSITORY / "scripts" / "stage_site.py")
site = importlib.util.module_from_spec(spec)
sys.modules["stage_site"] = site
spec.loader.exec_module(site)


def repository(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def staged(folder: Path, **files: str) -> Path:
    root = repository(folder / "repository", **files)
    site.stage(root, folder / "pages")
    return folder / "pages"


def test_every_page_of_this_repository_is_staged_and_named(tmp_path):
    pytest.importorskip("tomllib", reason="is of Python 3.11 and newer")
    sources = site.stage(REPOSITORY, tmp_path)
    site.check_nav(site.read_nav(REPOSITORY), sources, REPOSITORY)
    assert (tmp_path / "index.md").read_text().startswith("# peft-reft")
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"README.md"} <= {
        path.name for path in tmp_path.glob("*.md")
    }


def test_the_api_page_has_every_public_name():
    page = (REPOSITORY / "docs" / "api.md").read_text()
    for name in peft_reft.__all__:
        assert f"::: peft_reft.{name}\n" in page, f"docs/api.md lacks {name}"


def test_links_lead_to_pages_and_bring_them_along(tmp_path):
    pages = staged(
        tmp_path,
        **{
            "docs__README.md": "[a](a.md#part) [b](../b/) [c](../code/c.py) [web](https://e.org/x) [here](#here)",
            "docs__a.md": "[up](README.md) ![p](images/p.png)",
            "docs__images__p.png": "not looked into",
            "b__README.md": "[c](../code/c.py)",
            "code__c.py": "print('```')\n",
            "code__d.yaml": "unlinked: true\n",
        },
    )
    text = (pages / "index.md").read_text().split()
    assert text[0] == "[a](a.md#part)" and text[1] == "[b](project/b/index.md)"
    assert text[2] == "[c](project/code/c.py.md)" and text[3:] == ["[web](https://e.org/x)", "[here](#here)"]
    assert (pages / "a.md").read_text() == "[up](index.md) ![p](images/p.png)\n"
    assert (pages / "project/b/index.md").read_text() == "[c](../code/c.py.md)\n"
    assert "````python\nprint('```')\n````" in (pages / "project/code/c.py.md").read_text()
    assert not (pages / "project/code/d.yaml.md").exists()


def test_names_that_begin_with_a_dot_lose_it(tmp_path):
    """zensical has no pages of hidden files, and a link to one would end the build."""
    pages = staged(tmp_path, **{"docs__README.md": "[flow](../.github/w/r.yml)", ".github__w__r.yml": "on: push\n"})
    assert (pages / "index.md").read_text() == "[flow](project/github/w/r.yml.md)\n"
    assert "on: push" in (pages / "project/github/w/r.yml.md").read_text()


def test_a_link_to_nothing_is_named_with_its_line(tmp_path):
    files = {"docs__README.md": "fine\n\n[gone](gone.md) and [out](../../secret)", "docs__b.md": "[x](y.py)"}
    with pytest.raises(site.BrokenSite) as error:
        staged(tmp_path, **files)
    assert str(error.value).splitlines() == [
        "docs/b.md:1: y.py leads to nothing in the repository.",
        "docs/README.md:3: gone.md leads to nothing in the repository.",
        "docs/README.md:3: ../../secret leads to nothing in the repository.",
    ]


def test_code_is_no_link(tmp_path):
    text = "`[a](b)` and [`x`](c.md)\n\n```python pyreft\n[a](b)\n```\n\n[d](c.md)\n"
    pages = staged(tmp_path, **{"docs__README.md": text, "docs__c.md": "c"})
    # The word after the language, by which tests know a block, is not for the site.
    assert (pages / "index.md").read_text() == text.replace(" pyreft", "")


def test_a_notebook_is_a_page_with_what_it_printed(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "[page](../docs/README.md)"]},
        {"cell_type": "code", "source": "print(1)", "outputs": [{"output_type": "stream", "text": "1\n"}]},
        {"cell_type": "code", "source": "x = 2", "outputs": []},
    ]
    pages = staged(tmp_path, **{"docs__README.md": "[n](../nb/n.ipynb)", "nb__n.ipynb": json.dumps({"cells": cells})})
    assert (pages / "project/nb/n.md").read_text() == (
        "# Title\n[page](../../index.md)\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nx = 2\n```\n"
    )


@pytest.mark.parametrize(
    "nav, fault",
    [
        ([{"Home": "index.md"}], "docs/a.md is in no list of nav in zensical.toml: add a line for it."),
        (
            [{"Home": "index.md"}, {"More": [{"A": "a.md"}, {"B": "b.md"}]}],
            "nav in zensical.toml names b.md, which is no page.",
        ),
    ],
)
def test_the_nav_has_every_page_and_no_other(nav, fault, tmp_path):
    root = repository(tmp_path / "repository", **{"docs__README.md": "x", "docs__a.md": "y"})
    sources = site.stage(root, tmp_path / "pages")
    with pytest.raises(site.BrokenSite, match="^" + fault.replace(".", r"\.") + "$"):
        site.check_nav(nav, sources, root)


def test_types_in_docstrings_lose_their_marks(tmp_path):
    text = (
        'def f():\n    """Args:\n        r (`int`, *optional*): As in `g`.\n        a, b (`str` or `list[str]`): x\n\n'
        "    Returns:\n        `str`, *optional*: `None` is none.\n\n"
        '    Example:\n\n        ```py\n        >>> f()\n        ```\n    """\n    g(`x`): y\n'
    )
    root = repository(tmp_path / "repository", **{"peft_reft__a.py": text, "integrations__lib__b.py": "pass\n"})
    site.stage_package(root, tmp_path / "package")
    lines = (tmp_path / "package/peft_reft/a.py").read_text().splitlines()
    assert lines[2] == "        r (int, optional): As in `g`."
    assert lines[3] == "        a, b (str or list[str]): x"
    assert lines[6] == "        str, optional: `None` is none."
    assert lines[10:13] == ["    ```py", "    >>> f()", "    ```"]
    assert (tmp_path / "package/peft_reft/integrations/lib/b.py").exists()
