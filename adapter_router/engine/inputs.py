"""Rows -> token features -> one padded batch. A row that cannot be encoded fails alone."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from adapter_router.errors import InputTooLong, InvalidRequest
from adapter_router.types import Array, Row, is_unicode

FEATURES = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class EncodedRow:
    """``features``: 1-D int64 arrays of one length, without padding of ours."""

    features: Mapping[str, Array]

    @property
    def num_tokens(self) -> int:
        return len(self.features["input_ids"])


@dataclass(frozen=True)
class InputLimits:
    """What the base takes: ids below ``vocab_size``, at most ``max_tokens`` of them, these ``features``.

    ``token_type_ids`` lie below ``type_vocab_size``.
    """

    vocab_size: int
    max_tokens: int
    features: tuple[str, ...]
    pad_token_id: int
    type_vocab_size: int

    @property
    def max_characters(self) -> int:
        """Longest text that is tokenised at all: nobody waits for a book of which a page would be kept."""
        return 256 * self.max_tokens


class InputEncoder:
    """Tokenises and checks rows. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, limits: InputLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        # Fast tokenizers keep truncation settings in shared state and raise "Already borrowed" across threads.
        self._tokenizer_lock = threading.Lock()

    @property
    def max_tokens(self) -> int:
        """Longest input the base takes, special tokens included."""
        return self._limits.max_tokens

    def encode(self, row: Row) -> EncodedRow:
        """Raises InvalidRequest (or InputTooLong) with what is wrong and the limit."""
        if isinstance(row.inputs, str):
            encoded = self._tokenise(row.inputs, self._truncation(row))
        elif isinstance(row.inputs, Mapping):
            encoded = self._checked(row.inputs)
        else:
            raise InvalidRequest("inputs must be a text or the model's features by name", "inputs")
        if encoded.num_tokens > self._limits.max_tokens:
            raise InputTooLong(
                f"the input has {encoded.num_tokens} tokens, this model takes {self._limits.max_tokens}; "
                "shorten it or set truncate_prompt_tokens",
                "inputs",
            )
        return encoded

    def collate(self, rows: Sequence[EncodedRow], device: torch.device) -> dict[str, torch.Tensor]:
        """Features of (rows, longest), padded on the right."""
        longest = max(row.num_tokens for row in rows)
        batch = {}
        for name in self._limits.features:
            fill = self._limits.pad_token_id if name == "input_ids" else 0
            padded = np.full((len(rows), longest), fill, dtype=np.int64)
            for index, row in enumerate(rows):
                if name in row.features:
                    padded[index, : row.num_tokens] = row.features[name]
            batch[name] = torch.from_numpy(padded).to(device)
        return batch

    def _truncation(self, row: Row) -> int | None:
        value = row.parameters.get("truncate_prompt_tokens")
        if value is None:
            return None
        # Asked for no more than its special tokens, a tokenizer would not truncate at all, and say nothing.
        least = 1 + (self._tokenizer.num_special_tokens_to_add() if self._tokenizer else 0)
        if not isinstance(value, int) or isinstance(value, bool) or (value < least and value != -1):
            problem = f"truncate_prompt_tokens must be an integer of at least {least}, or -1 for the model's limit"
            raise InvalidRequest(problem, "truncate_prompt_tokens")
        return self._limits.max_tokens if value == -1 else min(value, self._limits.max_tokens)

    def _tokenise(self, text: str, max_length: int | None) -> EncodedRow:
        if self._tokenizer is None:
            raise InvalidRequest("this base model has no tokenizer; send input_ids", "inputs")
        if len(text) > self._limits.max_characters:
            limit = self._limits.max_characters
            raise InputTooLong(f"the text has {len(text)} characters, at most {limit} are read", "inputs")
        if not is_unicode(text):
            raise InvalidRequest("the text holds half of a surrogate pair, which is no character", "inputs")
        with self._tokenizer_lock:
            encoded = self._tokenizer(text, truncation=max_length is not None, max_length=max_length, verbose=False)
        features = {name: np.asarray(encoded[name]) for name in self._limits.features if name in encoded}
        if len(features["input_ids"]) == 0:
            raise InvalidRequest("the input is empty", "inputs")
        features.setdefault("attention_mask", np.ones_like(features["input_ids"]))
        return EncodedRow(features)

    def _checked(self, inputs: Mapping[str, Array]) -> EncodedRow:
        unknown = sorted(set(inputs) - set(self._limits.features))
        if unknown:
            raise InvalidRequest(
                f"unknown features {unknown}; this model takes {list(self._limits.features)}", "inputs"
            )
        if "input_ids" not in inputs:
            raise InvalidRequest("input_ids is missing", "inputs")
        ids = _integers("input_ids", inputs["input_ids"])
        arrays = {name: _integers(name, value) for name, value in inputs.items()}
        if any(len(array) != len(ids) for array in arrays.values()):
            raise InvalidRequest(f"{', '.join(arrays)} must be of one length", "inputs")
        if ids.min() < 0 or ids.max() >= self._limits.vocab_size:
            raise InvalidRequest(f"input_ids must lie in 0 to {self._limits.vocab_size - 1}", "inputs")
        types = arrays.get("token_type_ids")
        if types is not None and (types.min() < 0 or types.max() >= self._limits.type_vocab_size):
            raise InvalidRequest(f"token_type_ids must lie in 0 to {self._limits.type_vocab_size - 1}", "inputs")
        mask = arrays.get("attention_mask")
        if mask is None:
            arrays["attention_mask"] = np.ones_like(ids)
        elif mask.min() < 0 or mask.max() != 1:
            raise InvalidRequest("attention_mask must hold 0 and 1, and at least one 1", "inputs")
        return EncodedRow(arrays)


def _integers(name: str, value: Array) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise InvalidRequest(f"{name} must be a non-empty 1-D array of integers", "inputs")
    return array.astype(np.int64, copy=False)
