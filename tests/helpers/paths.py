"""Paths of this repository, for tests in any folder."""

from pathlib import Path


HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
DATA = TESTS / "data"  # numbers and checkpoints of other libraries
REPOSITORY = TESTS.parent
