"""ReFT in axolotl: a LoRA YAML becomes a ReFT YAML by one line.

```yaml
adapter: loreft  # or noreft, direft, nodireft, consreft, lobireft
```

axolotl 0.21 finds the plugin among the installed packages. axolotl 0.19 has to be told of it:

```yaml
plugins:
  - peft_reft.integrations.axolotl.ReftPlugin
```
"""

from .args import ReftArgs
from .plugin import ReftPlugin


__all__ = ["ReftArgs", "ReftPlugin"]
