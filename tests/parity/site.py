"""Where an adapter is built: a base, a task, a number of labels and this seed's random choices."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft import LoraConfig
from torch import nn

from tests.parity.bases import CLASSIFYING, TASK_TYPES, Architecture, Base

ALPHAS = (2, 2.5, 6, 8, 16, -4)


@dataclass(frozen=True)
class Site:
    """``headless``: the adapter brings no head and leaves ``task_type`` empty, so PEFT saves none."""

    base: Base
    rng: random.Random
    headless: bool = False

    @property
    def arch(self) -> Architecture:
        return self.base.architecture

    @property
    def generative(self) -> bool:
        return self.base.task in ("text-generation", "seq2seq-generation")

    @property
    def causal(self) -> bool:
        return self.base.task == "text-generation"

    @property
    def task_type(self) -> str | None:
        """What the configuration says; a headless classifier must not say it, or PEFT appends a head."""
        return None if self.headless and self.arch.heads_of(self.base.task) else TASK_TYPES[self.base.task]

    @cached_property
    def labels(self) -> int:
        """Labels of the adapter's head: the base's own where it brings none."""
        if self.headless or self.base.task not in CLASSIFYING or self.rng.random() < 0.2:
            return self.base.labels
        return self.rng.randint(1, 5)

    @property
    def alpha(self) -> float:
        """A positive ``lora_alpha``: initialisations from the base's weights divide by its root."""
        return self.rng.choice([alpha for alpha in ALPHAS if alpha > 0])

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.base.pristine(self.labels).named_modules())

    def has(self, name: str) -> bool:
        """Whether some module's path is ``name`` or ends with it after a dot."""
        return bool(name) and any(path == name or path.endswith("." + name) for path in self.modules)

    def paths(self, name: str) -> list[str]:
        """Full paths of the modules called ``name``."""
        return [path for path in self.modules if path == name or path.endswith("." + name)]

    def attention(self) -> list[str]:
        """At least two of the attention's linears."""
        names = list(self.arch.attention)
        return self.rng.sample(names, self.rng.randint(2, len(names)))

    def linears(self) -> list[str]:
        """Some of a layer's linears, of attention and others."""
        return self.attention() + self.rng.sample(self.arch.mlp, min(1, len(self.arch.mlp)))

    @property
    def brings_head(self) -> bool:
        return not self.headless and bool(self.arch.heads_of(self.base.task))

    def saved(self, *extra: str) -> list[str] | None:
        """``modules_to_save``: the task's head and ``extra``."""
        heads = () if self.headless else self.arch.heads_of(self.base.task)
        return [*extra, *heads] or None

    def fields(self) -> dict[str, Any]:
        """What every kind of PEFT configuration takes."""
        return {"task_type": self.task_type, "modules_to_save": self.saved()}

    def lora(self, **fields: Any) -> LoraConfig:
        """A LoRA configuration, random where ``fields`` says nothing."""
        chosen: dict[str, Any] = {
            **self.fields(),
            "r": self.rng.randint(1, 6),
            "lora_alpha": self.rng.choice(ALPHAS),
            "target_modules": self.linears(),
            "init_lora_weights": False,
            "fan_in_fan_out": self.arch.conv1d,
        }
        return LoraConfig(**{**chosen, **fields})

    def tokens(self, count: int) -> list[int]:
        return sorted(self.rng.sample(range(5, self.base.sizes.vocab), count))

    @property
    def numbered(self) -> str:
        """The name of the list of layers, "" where PEFT does not find a layer's number in the paths."""
        name = self.arch.stack.split(".")[-1]
        return name if name and any(f".{name}.1." in path for path in self.modules) else ""

    def layer_path(self) -> str:
        """The full path of one attention linear."""
        return self.rng.choice(self.paths(self.arch.attention[0]))
