"""Where each token of a row lies in its text: what turns answers about tokens into answers about characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapter_router.types import Array

if TYPE_CHECKING:
    from tokenizers import Encoding


@dataclass(frozen=True)
class TextSpans:
    """The tokens of one or two ``texts``, special tokens included.

    ``subwords``: whether a token continues the word of the token before it. ``no_answer``: whether the first token
    stands for "the text does not say" (a CLS token).
    """

    texts: tuple[str, ...]
    offsets: Array  # (tokens, 2): characters of the token's own text
    special: Array  # (tokens,) bool
    words: Array  # (tokens,): index of the word in its text, -1 for none
    sequences: Array  # (tokens,): index of the text, -1 for special tokens
    subwords: Array  # (tokens,) bool
    no_answer: bool = False

    @classmethod
    def of(
        cls,
        texts: tuple[str, ...],
        encoding: Encoding,
        *,
        unk_token_id: int | None,
        cls_token_id: int | None,
        marks_pieces: bool,
    ) -> TextSpans:
        """Spans of a fast tokenizer's ``encoding`` of ``texts``.

        ``marks_pieces``: the vocabulary spells pieces inside a word differently (WordPiece's ``##``).
        """
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        sequences = _indices(encoding.sequence_ids)
        ids = np.asarray(encoding.ids, dtype=np.int64)
        continues = _marked(encoding.tokens, offsets) if marks_pieces else _unspaced(texts, offsets, sequences)
        return cls(
            texts=texts,
            offsets=offsets,
            special=np.asarray(encoding.special_tokens_mask, dtype=bool),
            words=_indices(encoding.word_ids),
            sequences=sequences,
            subwords=continues & (ids != (-1 if unk_token_id is None else unk_token_id)),
            no_answer=len(ids) > 0 and int(ids[0]) == cls_token_id,
        )


def _indices(values: Sequence[int | None]) -> Array:
    return np.asarray([-1 if value is None else value for value in values], dtype=np.int64)


def _marked(tokens: Sequence[str], offsets: Array) -> Array:
    """transformers' rule: a token spelled longer (or shorter) than its stretch of text carries the mark."""
    marked: Array = np.asarray([len(token) for token in tokens], dtype=np.int64) != offsets[:, 1] - offsets[:, 0]
    return marked


def _unspaced(texts: Sequence[str], offsets: Array, sequences: Array) -> Array:
    """transformers' rule where vocabularies mark nothing: no space before the token, nor at its start."""
    continues = [
        sequence >= 0 and start > 0 and " " not in texts[sequence][start - 1 : start + 1]
        for (start, _), sequence in zip(offsets.tolist(), sequences.tolist(), strict=True)
    ]
    return np.asarray(continues, dtype=bool)
