"""What is refused, and is expected to be."""

from __future__ import annotations

from tests.parity.bases import Base
from tests.parity.configs import Recipe

# (recipe, architecture), "" for every architecture -> why.
_REFUSED: dict[tuple[str, str], str] = {
    ("loha-conv", ""): "LoHa of a convolution has a form of its own that is not served",
}


def refused(base: Base, recipe: Recipe) -> bool:
    """Whether the engine may refuse an adapter of ``recipe`` on ``base``."""
    return any((recipe.name, name) in _REFUSED for name in (base.architecture.name, ""))
