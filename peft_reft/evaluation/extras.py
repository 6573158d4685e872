"""Libraries that only evaluation needs are imported where they are used, and a missing one is an error that names the extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """For imports.

    Args:
        what (`str`): What needs them, as the beginning of a sentence.

    Raises:
        ValueError: when one is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{what} needs libraries of the extra 'eval': pip install 'peft-reft[eval]'. {error}"
        ) from error
