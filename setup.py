"""The one thing that pyproject.toml and setup.cfg can't say: a file is installed beside the packages.

peft_reft_autoload.pth has to lie in site-packages itself, from a wheel and from an editable install. Everything else
about the project stands in pyproject.toml and setup.cfg.
"""

from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py


PTH = Path("peft_reft_autoload", "peft_reft_autoload.pth")


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


setup(cmdclass={"build_py": BuildPyWithPth})
