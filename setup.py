"""What pyproject.toml can't say: the project's addresses, a long description for an index page, and a .pth file.

README.md links to files of the repository, which is right in the repository and leads nowhere from an index. Here such
links become addresses of the files of the released version. peft_reft_autoload.pth has to lie in site-packages itself,
beside the packages, from a wheel and from an editable install. Everything else stands in pyproject.toml and setup.cfg.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py


# The repository's address, without a slash at the end, and the only place that has it. `.example` is reserved and
# belongs to nobody (RFC 2606): the release workflow stops until this is the address of the repository that it runs in.
REPOSITORY = "https://git.example/peft-reft"
ROOT = Path(__file__).parent
PTH = Path("peft_reft_autoload", "peft_reft_autoload.pth")


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


class BuildPyWithPth(build_py):
    """Copies the .pth file to where the packages are laid out."""

    def run(self) -> None:
        super().run()
        # An editable install leaves the packages where they are. Its wheel is made of what is "installed".
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(str(folder))
        self.copy_file(str(PTH), str(Path(folder, PTH.name)), preserve_mode=False)

    def get_source_files(self) -> list[Any]:
        return [*super().get_source_files(), str(PTH)]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [] if self.editable_mode else [str(Path(self.build_lib, PTH.name))]
        return [*super().get_outputs(include_bytecode), *own]


setup(
    cmdclass={"build_py": BuildPyWithPth},
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
