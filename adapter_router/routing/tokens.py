"""How many tokens an input will be: a guess that learns from the answers. Nobody tokenises in the router."""

from __future__ import annotations

from collections.abc import Mapping

from adapter_router.types import Inputs

_SPECIAL = 2  # what most tokenizers put around a text
_LOWEST_RATIO, _HIGHEST_RATIO = 0.5, 16.0  # bytes a token; beyond it lie texts that were cut


class TokenEstimate:
    """Of a text, its bytes over the usual bytes a token; of an image, the usual number; of features, their length."""

    def __init__(self, max_tokens: int | None = None) -> None:
        """``max_tokens``: the base's limit; longer texts are cut or refused."""
        self._max_tokens = max_tokens
        self._ratio = _Mean(4.0)  # English
        self._image = _Mean(200.0)  # 14 x 14 patches and a few

    def of(self, inputs: Inputs) -> int:
        """At least 1. Never raises: what is wrong with an input is said where it is encoded."""
        if _is_image(inputs):
            tokens = round(self._image.value)
        elif isinstance(inputs, Mapping):
            tokens = _length(inputs)
        else:
            tokens = round(_num_bytes(inputs) / self._ratio.value) + _SPECIAL
        return max(1, tokens if self._max_tokens is None else min(tokens, self._max_tokens))

    def learn(self, inputs: Inputs, num_tokens: int) -> None:
        """``inputs`` were ``num_tokens``."""
        if _is_image(inputs):
            self._image.add(num_tokens)
        elif not isinstance(inputs, Mapping) and num_tokens > _SPECIAL:
            ratio = _num_bytes(inputs) / (num_tokens - _SPECIAL)
            self._ratio.add(min(max(ratio, _LOWEST_RATIO), _HIGHEST_RATIO))


class _Mean:
    """Of the last hundred values or so; what it starts with counts as ten."""

    def __init__(self, value: float) -> None:
        self.value = value
        self._weight = 10

    def add(self, value: float) -> None:
        self._weight = min(self._weight + 1, 100)
        self.value += (value - self.value) / self._weight


def _is_image(inputs: Inputs) -> bool:
    return isinstance(inputs, bytes) or (isinstance(inputs, Mapping) and "pixel_values" in inputs)


def _num_bytes(inputs: object) -> int:
    """Of UTF-8, of a text or several; at most a look at each character, and none at ASCII."""
    if isinstance(inputs, str):
        return len(inputs) if inputs.isascii() else len(inputs.encode("utf-8", "surrogatepass"))
    return sum(map(_num_bytes, inputs)) if isinstance(inputs, tuple) else 0


def _length(features: Mapping[str, object]) -> int:
    """Of ``input_ids``, or of whatever else has one: a caller's arrays may be lists, or nonsense."""
    for value in (features.get("input_ids"), *features.values()):
        try:
            return len(value)  # type: ignore[arg-type]
        except TypeError:
            continue
    return 1
