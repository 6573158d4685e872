"""ReFT in axolotl: a LoRA YAML becomes a ReFT YAML by two lines.

```yaml
plugins:
  - peft_reft.integrations.axolotl.ReftPlugin
adapter: loreft  # or noreft, direft, nodireft, consreft, lobireft
```
"""

from .args import ReftArgs
from .plugin import ReftPlugin


__all__ = ["ReftArgs", "ReftPlugin"]
