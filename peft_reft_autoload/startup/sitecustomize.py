"""What Python imports when it starts, where `peft-reft run` put this folder first in PYTHONPATH.

It does what the .pth file does, and then imports the environment's own sitecustomize, which this one hides.
"""

import os
import sys


def _start() -> None:
    try:
        import peft_reft_autoload

        peft_reft_autoload.install()
    except Exception:
        pass  # a Python of another environment, without peft-reft
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != own]
    this = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", this)  # Python expects one


_start()
