"""What pyproject.toml can't say: the project's addresses, from one constant, and a long description for an index page.

README.md links to files of the repository, which is right in the repository and leads nowhere from an index. Here such
links become addresses of the files of the released version. Everything else stands in pyproject.toml and setup.cfg.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup


# The repository's address, without a slash at the end, and the only place that has it. `.example` is reserved and
# belongs to nobody (RFC 2606): the release workflow stops until this is the address of the repository that it runs in.
REPOSITORY = "https://git.example/peft-reft"
ROOT = Path(__file__).parent


def version() -> str:
    """`peft_reft.__version__`, which pyproject.toml reads too, without importing the package."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "peft_reft" / "__init__.py").read_text("utf-8"), re.MULTILINE)
    assert found is not None, "peft_reft/__init__.py has no line __version__ = ..."
    return found[1]


def long_description() -> str:
    """README.md, with links to files of the repository as addresses: pictures as files, pages as pages."""

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['words']}]({REPOSITORY}/{kind}/v{version()}/{link['target']})"

    relative = r"(?P<picture>!?)\[(?P<words>[^\]]*)\]\((?!https?:|#|mailto:)(?P<target>[^)\s]+)\)"
    return re.sub(relative, absolute, (ROOT / "README.md").read_text("utf-8"))


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls={
        "Repository": REPOSITORY,
        "Documentation": f"{REPOSITORY}/blob/v{version()}/docs/README.md",
        "Changelog": f"{REPOSITORY}/blob/v{version()}/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
        "Paper": "https://arxiv.org/abs/2404.03592",
    },
)
