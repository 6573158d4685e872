"""ReFT in axolotl: one line makes a LoRA YAML a ReFT YAML.

```yaml
adapter: loreft  # or noreft, direft, nodireft, consreft, lobireft
```

axolotl 0.21 finds the plugin among the installed packages. axolotl 0.19 needs it named:

```yaml
plugins:
  - peft_reft.integrations.axolotl.ReftPlugin
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .args import ReftArgs
    from .plugin import ReftPlugin

__all__ = ["ReftArgs", "ReftPlugin"]


def __getattr__(name: str) -> Any:
    """The plugin and its arguments, when they are asked for: `keys` is read where axolotl is not installed, too."""
    if name == "ReftPlugin":
        from .plugin import ReftPlugin

        return ReftPlugin
    if name == "ReftArgs":
        from .args import ReftArgs

        return ReftArgs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
