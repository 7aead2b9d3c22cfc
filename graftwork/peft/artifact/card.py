"""The model card beside an adapter."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from graftwork.peft.artifact.config import ArtifactConfig, Entry

CARD = """---
library_name: graftwork
base_model: {base}
tags: [peft, {methods}]
---

# Adapter for {base}

{rows}

{prompt}{count:,} values ({size:.1f} MB), trained for {step} steps. Load it on the same base:

```python
from graftwork import models

model = models.load("{base}")
model.load_adapters("path/to/this/directory")
model.freeze()
```
"""


def model_card(config: ArtifactConfig, tensors: Mapping[str, Tensor]) -> str:
    """Return a README for the artifact: what it is, what base it needs, how to load it."""
    rows = []
    for adapter in config.adapters:
        settings = ", ".join(f"{k}={v!r}" for k, v in adapter.hyperparameters.items() if v is not None)
        rows.append(f"* `{adapter.method}({settings})`")
    return CARD.format(
        base=config.base.name,
        methods=", ".join(sorted({a.method.lower() for a in config.adapters})),
        rows="\n".join(rows),
        prompt=_asked(config.adapters),
        count=sum(t.numel() for t in tensors.values()),
        size=sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6,
        step=config.step if config.step is not None else "an unknown number of",
    )


def _asked(adapters: Sequence[Entry]) -> str:
    """Return the sentence that tells how the adapters were trained to be asked, or nothing where it is unknown."""
    prompts = [a.prompt.prompt_template for a in adapters if a.prompt is not None]
    texts = [list(given.values()) if isinstance(given, dict) else [given] for given in prompts if given is not None]
    templates = dict.fromkeys(template for given in texts for template in given)
    return f"Trained on the prompt {', '.join(map(repr, templates))}. " if templates else ""
