"""Rows of text or features -> token features -> one padded batch. A row that cannot be encoded fails alone."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from adapter_router.engine.probe import Batch
from adapter_router.engine.tasks.spans import TextSpans
from adapter_router.errors import InputTooLong, InvalidRequest
from adapter_router.types import Array, Row, is_unicode

TEXT_FEATURES = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")
_DECODER = "decoder_input_ids"
Side = Literal["left", "right"]


@dataclass(frozen=True)
class EncodedRow:
    """``features`` without padding of ours; ``spans``: where the tokens lie in the text, None where none was given.

    ``num_tokens``: tokens of the input (0 for an image); ``num_outputs``: positions that the model answers for.
    """

    features: Mapping[str, Array]
    num_tokens: int
    num_outputs: int
    spans: TextSpans | None = None
    is_long: bool = False

    def without(self, feature: str) -> EncodedRow:
        """The row as if it had been sent without ``feature``."""
        return replace(self, features={name: array for name, array in self.features.items() if name != feature})

    @property
    def shape_key(self) -> tuple[int, ...]:
        """Equal for rows that may share a batch."""
        return (self.is_long,) if "input_ids" in self.features else self.features["pixel_values"].shape


class RowEncoder(Protocol):
    """What turns rows into batches: text or images. Thread-safe."""

    @property
    def max_tokens(self) -> int:
        """Longest input the base takes, special tokens included; 0 where there are no tokens."""

    def encode(self, row: Row, prefix: str = "") -> EncodedRow:
        """Raises InvalidRequest with what is wrong and the limit."""

    def collate(self, rows: Sequence[EncodedRow], device: torch.device) -> Batch:
        """One batch of (rows, …)."""

    def padding(self, rows: Sequence[EncodedRow]) -> int | None:
        """The token that a batch of ``rows`` is filled up with; None where there are no tokens."""

    def samples(self, count: int, tokens: int | None) -> list[EncodedRow]:
        """Rows to try a model with; ``tokens`` None: of different lengths where the input has one."""

    def detokenize(self, ids: Sequence[int]) -> str | None:
        """Text of generated tokens; None without a tokenizer."""


@dataclass(frozen=True)
class InputLimits:
    """What the base takes: ids below ``vocab_size``, at most ``max_tokens`` of them, these ``features``.

    ``token_type_ids`` lie below ``type_vocab_size``. Rows of ``long_from`` tokens and more are computed differently,
    and must not lengthen a batch of others. ``pad_token_id`` None: the model knows of no padding.
    """

    vocab_size: int
    max_tokens: int
    features: tuple[str, ...]
    pad_token_id: int | None
    type_vocab_size: int
    long_from: int = 1 << 62

    @property
    def max_characters(self) -> int:
        """Longest text that is tokenised at all: nobody waits for a book of which a page would be kept."""
        return 256 * self.max_tokens


class TextEncoder:
    """Tokenises and checks rows. Thread-safe."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, limits: InputLimits, decoder_start: int | None = None
    ) -> None:
        """``decoder_start``: the token that an encoder-decoder's decoder begins with."""
        self.masks_anywhere = True  # False: a row's masked tokens answer differently beside longer rows
        self._tokenizer = tokenizer
        self._decoder_start = decoder_start
        self._limits = limits
        # Fast tokenizers keep truncation settings in shared state and raise "Already borrowed" across threads.
        self._tokenizer_lock = threading.Lock()

    @property
    def max_tokens(self) -> int:
        """Longest input the base takes, special tokens included."""
        return self._limits.max_tokens

    def encode(self, row: Row, prefix: str = "") -> EncodedRow:
        """Raises InvalidRequest (or InputTooLong) with what is wrong and the limit. ``prefix`` goes before a text."""
        if isinstance(row.inputs, str | tuple):
            encoded = self._tokenise(_texts(row.inputs, prefix), self._truncation(row))
        elif isinstance(row.inputs, Mapping):
            encoded = self._checked(row.inputs)
        else:
            raise InvalidRequest("this base takes text, not images: send a text or the model's features", "inputs")
        if encoded.num_tokens > self._limits.max_tokens:
            raise InputTooLong(
                f"the input has {encoded.num_tokens} tokens, this model takes {self._limits.max_tokens}; "
                "shorten it or set truncate_prompt_tokens",
                "inputs",
            )
        return replace(encoded, is_long=encoded.num_tokens >= self._limits.long_from)

    def collate(self, rows: Sequence[EncodedRow], device: torch.device, side: Side = "right") -> Batch:
        """Features of (rows, longest), padded on one ``side``."""
        padding = self.padding(rows)
        batch = {}
        for name in self._limits.features:
            given = any(name in row.features for row in rows)
            if not given and name not in ("attention_mask", "token_type_ids"):
                continue
            arrays = [row.features.get(name) for row in rows]
            fill = padding if name in ("input_ids", _DECODER) else 0
            like = _DECODER if name.startswith("decoder_") else "input_ids"
            lengths = [len(row.features[like]) for row in rows]
            padded = np.full((len(rows), max(lengths)), fill, dtype=np.int64)
            for index, (array, length) in enumerate(zip(arrays, lengths, strict=True)):
                if array is not None:
                    place = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
                    padded[index, place] = array
            batch[name] = torch.from_numpy(padded).to(device)
        return batch

    def samples(self, count: int, tokens: int | None) -> list[EncodedRow]:
        """Token ids all over the vocabulary, none of them padding; ``tokens`` None: 4 to 11 of them."""
        rows = []
        for index in range(count):
            length = tokens or 4 + 7 * index // max(1, count - 1)
            ids = (np.arange(1, length + 1) * 7919 + index * 104729) % self._limits.vocab_size
            ids = np.where(ids == self._limits.pad_token_id, (ids + 1) % self._limits.vocab_size, ids)
            rows.append(self._checked({"input_ids": ids, **({_DECODER: ids[::-1][:-1]} if self._has_decoder else {})}))
        return rows

    def detokenize(self, ids: Sequence[int]) -> str | None:
        """Text of generated tokens; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        with self._tokenizer_lock:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def _has_decoder(self) -> bool:
        return _DECODER in self._limits.features

    def padding(self, rows: Sequence[EncodedRow]) -> int:
        """The model's padding token; for a model without one, a token that none of ``rows`` has."""
        if self._limits.pad_token_id is not None:
            return self._limits.pad_token_id
        used = {int(token) for row in rows for token in row.features["input_ids"]}
        return next(token for token in range(len(used) + 1) if token not in used) % self._limits.vocab_size

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

    def _tokenise(self, texts: tuple[str, ...], max_length: int | None) -> EncodedRow:
        if self._tokenizer is None:
            raise InvalidRequest("this base model has no tokenizer; send input_ids", "inputs")
        for text in texts:
            if len(text) > self._limits.max_characters:
                limit = self._limits.max_characters
                raise InputTooLong(f"the text has {len(text)} characters, at most {limit} are read", "inputs")
            if not is_unicode(text):
                raise InvalidRequest("the text holds half of a surrogate pair, which is no character", "inputs")
        fast = self._tokenizer.is_fast
        # Of a question and its context, the context may lose its end.
        truncation = False if max_length is None else "only_second" if len(texts) == 2 else True
        with self._tokenizer_lock:
            try:
                encoded = self._tokenizer(*texts, truncation=truncation, max_length=max_length, verbose=False)
            except Exception as error:
                raise InvalidRequest(f"the text cannot be cut to {max_length} tokens: {error}", "inputs") from error
        features = {name: np.asarray(encoded[name]) for name in self._limits.features if name in encoded}
        length = len(features["input_ids"])
        if length == 0:
            raise InvalidRequest("the input is empty", "inputs")
        features.setdefault("attention_mask", np.ones_like(features["input_ids"]))
        return EncodedRow(self._with_decoder(features), length, length, self._spans(texts, encoded) if fast else None)

    def _without_padding(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """The row up to its last attended token; masked tokens before it cannot be served exactly."""
        mask = arrays["attention_mask"]
        end = int(np.flatnonzero(mask)[-1]) + 1
        if not mask[:end].all():
            raise InvalidRequest(
                "this base answers a row with masked tokens differently beside longer rows: leave them out", "inputs"
            )
        return {name: array if name.startswith("decoder_") else array[:end] for name, array in arrays.items()}

    def _spans(self, texts: tuple[str, ...], encoded: BatchEncoding) -> TextSpans:
        tokenizer: Any = self._tokenizer
        return TextSpans.of(
            texts,
            encoded.encodings[0],
            unk_token_id=tokenizer.unk_token_id,
            cls_token_id=tokenizer.cls_token_id,
            marks_pieces=bool(getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)),
        )

    def _with_decoder(self, features: dict[str, Array]) -> dict[str, Array]:
        """A text alone leaves a decoder with its start token."""
        if self._has_decoder and _DECODER not in features:
            start = self._decoder_start if self._decoder_start is not None else 0
            features[_DECODER] = np.array([start], dtype=np.int64)
        return features

    def _checked(self, inputs: Mapping[str, Array]) -> EncodedRow:
        unknown = sorted(set(inputs) - set(self._limits.features))
        if unknown:
            raise InvalidRequest(
                f"unknown features {unknown}; this model takes {list(self._limits.features)}", "inputs"
            )
        if "input_ids" not in inputs:
            raise InvalidRequest("input_ids is missing", "inputs")
        arrays = {name: _integers(name, value) for name, value in inputs.items()}
        ids = arrays["input_ids"]
        own = [array for name, array in arrays.items() if not name.startswith("decoder_")]
        if any(len(array) != len(ids) for array in own):
            raise InvalidRequest(f"{', '.join(arrays)} must be of one length", "inputs")
        for name in ("input_ids", _DECODER):
            array = arrays.get(name)
            if array is not None and (array.min() < 0 or array.max() >= self._limits.vocab_size):
                raise InvalidRequest(f"{name} must lie in 0 to {self._limits.vocab_size - 1}", "inputs")
        types = arrays.get("token_type_ids")
        if types is not None and (types.min() < 0 or types.max() >= self._limits.type_vocab_size):
            raise InvalidRequest(f"token_type_ids must lie in 0 to {self._limits.type_vocab_size - 1}", "inputs")
        mask = arrays.setdefault("attention_mask", np.ones_like(ids))
        if mask.min() < 0 or mask.max() != 1:
            raise InvalidRequest("attention_mask must hold 0 and 1, and at least one 1", "inputs")
        if not self.masks_anywhere and not mask.all():
            arrays = self._without_padding(arrays)
            ids = arrays["input_ids"]
        arrays = self._with_decoder(arrays)
        return EncodedRow(arrays, len(ids), self._checked_outputs(arrays))

    def _checked_outputs(self, arrays: Mapping[str, Array]) -> int:
        """Positions that the model answers for: the decoder's where it has one."""
        decoder = arrays.get(_DECODER)
        if decoder is None:
            return len(arrays["input_ids"])
        if len(arrays.get("decoder_attention_mask", decoder)) != len(decoder):
            raise InvalidRequest("decoder_input_ids and decoder_attention_mask must be of one length", "inputs")
        if len(decoder) > self._limits.max_tokens:
            raise InputTooLong(f"{len(decoder)} decoder tokens, this model takes {self._limits.max_tokens}", "inputs")
        return len(decoder)


def _texts(inputs: str | tuple[str, ...], prefix: str) -> tuple[str, ...]:
    texts = (inputs,) if isinstance(inputs, str) else inputs
    if len(texts) not in (1, 2) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("inputs must be a text or a pair of texts", "inputs")
    return (prefix + texts[0], *texts[1:])


def _integers(name: str, value: Array) -> Array:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # ragged lists, tensors with gradients
        array = np.empty(0)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise InvalidRequest(f"{name} must be a non-empty 1-D array of integers", "inputs")
    return array.astype(np.int64, copy=False)
