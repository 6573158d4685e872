"""Lets transformers take the PEFT that is installed, for the tests of `add_adapter` and `load_adapter`.

transformers 5.24.0 asks for PEFT 0.22.0, which is not released. Its code is that of 5.23.0, which asked for 0.20.0, so
it is tested with the PEFT that is installed. `OLDEST_PEFT` is what transformers asks for by itself.
"""

from __future__ import annotations

import peft
from packaging.version import Version
from transformers.integrations import peft as integration


OLDEST_PEFT = integration.MIN_PEFT_VERSION
IS_REFUSED = Version(peft.__version__) < Version(OLDEST_PEFT)

integration.MIN_PEFT_VERSION = min(OLDEST_PEFT, peft.__version__, key=Version)
