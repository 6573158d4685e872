"""Makes PEFT know ReFT in every process that imports PEFT, without an `import peft_reft`.

PEFT has no entry points for methods. So peft_reft_autoload.pth, which is installed beside the packages, has every
Python of the environment call `install` when it starts. That adds a finder to `sys.meta_path`, and nothing more until
somebody imports PEFT: then `peft_reft` is imported, too. Errors become a warning, and the import of PEFT goes on.

`PEFT_REFT_AUTOLOAD=0` in the environment switches this off. `peft-reft run COMMAND ...` (run.py) switches it on for
one command, also where the .pth file is missing (startup/sitecustomize.py).

peft_reft itself calls `serve`: what other libraries need for ReFT is done once somebody imports them, so that an
import of PEFT does not bring Trainer. This module runs when Python starts, so it imports nothing that a starting
Python has not loaded already.
"""

import os
import sys
from _thread import get_ident


TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

VARIABLE = "PEFT_REFT_AUTOLOAD"
OFF = ("0", "false", "no", "off")
# The modules whose imports are followed, and what is called after each: a module, which is imported for it, and a
# function, for which two calls are as good as one. All are followed from the start of Python on, because Trainer and
# the harness may be imported before peft_reft is, or import PEFT while their own import runs.
PEFT = "peft"
FOLLOWED = {
    PEFT: ("peft_reft", None),
    "transformers.trainer": ("peft_reft.tools.trainers", "serve_trainers"),
    "lm_eval.models.huggingface": ("peft_reft.integrations.lm_eval", "install"),
}


class FollowingFinder:
    """A meta path finder that finds modules by the finders after it, and calls a function once they are imported.

    Several threads may import at once: what they share are built-in containers whose single operations are atomic.
    """

    def __init__(self) -> None:
        self._served: set[str] = set()  # the modules of FOLLOWED after whose imports something is called
        self._running: list[str] = []  # modules whose code runs now, once for each thread that runs it
        self._searching: set[int] = set()  # threads that look for a module by the other finders

    def find_spec(self, name: str, path: "Any" = None, target: "ModuleType | None" = None) -> "ModuleSpec | None":
        """Python calls this for each import of a module that is not loaded. None: the next finder is asked."""
        thread = get_ident()
        if name not in FOLLOWED or thread in self._searching:
            return None
        self._searching.add(thread)
        try:
            for finder in list(sys.meta_path):
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._follow(name, spec.loader)
                    return spec
        except Exception:
            pass  # Python asks the other finders itself next, and raises what they raise
        finally:
            self._searching.discard(thread)
        return None

    def _follow(self, name: str, loader: "Any") -> None:
        """Have a loader act after it has run the code of a module."""
        run_code = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            loader.__dict__.pop("exec_module", None)  # leaves the loader as it was found
            self._running.append(name)
            try:
                run_code(module)
            finally:
                self._running.remove(name)
            if name in self._served:
                act_after(name)

        if not isinstance(loader, type):
            loader.exec_module = exec_module

    def serve(self, name: str) -> None:
        """Act after a module of `FOLLOWED`: now, if it is imported, and after each import and reload from now on."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        # In this order: a thread that ends the import of the module just now acts itself, or the condition holds.
        self._served.add(name)
        if name in sys.modules and name not in self._running:
            act_after(name)


FINDER = FollowingFinder()


def install() -> None:
    """Have PEFT's import bring ReFT's, unless the environment variable says no. Python's start calls this."""
    if is_on():
        FINDER.serve(PEFT)


def serve() -> None:
    """Serve the libraries that need something for ReFT, as they are imported. peft_reft's import calls this."""
    for name in FOLLOWED:
        if name != PEFT:
            FINDER.serve(name)


def is_on() -> bool:
    """Whether the environment variable leaves the autoload on."""
    return os.environ.get(VARIABLE, "").strip().lower() not in OFF


def act_after(name: str) -> None:
    """Do what `FOLLOWED` says, after the import of a module. An error becomes a warning."""
    if name == PEFT and not is_on():  # switched off since Python's start
        return
    module, function = FOLLOWED[name]
    try:
        __import__(module)
        if function is not None:
            getattr(sys.modules[module], function)()
    except Exception as error:
        _warn(f"{module}, which {name} needs for ReFT adapters, failed: {type(error).__name__}: {error}")


def _warn(text: str) -> None:
    """Give a warning. Where warnings are errors, it goes to the standard error: the import must not fail."""
    import warnings

    text += f". Adapters of other methods are as they were. {VARIABLE}=0 in the environment leaves peft_reft out."
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except Exception:
        if sys.stderr is not None:
            sys.stderr.write(text + "\n")
