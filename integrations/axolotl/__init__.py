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

from .args import ReftArgs
from .plugin import ReftPlugin


__all__ = ["ReftArgs", "ReftPlugin"]
