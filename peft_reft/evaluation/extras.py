"""The error for a missing library of the extra 'eval'. Such libraries are imported only where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """A context for imports of libraries that only the extra 'eval' installs.

    Args:
        what (`str`): The purpose of the libraries, as the beginning of a sentence: `"Scoring"`.

    Raises:
        ValueError: when a library is missing, with the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{what} needs libraries of the extra 'eval': pip install 'peft-reft[eval]'. {error}"
        ) from error
