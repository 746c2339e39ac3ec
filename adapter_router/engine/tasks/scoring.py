"""The scoring pass of generation tasks: how likely each token was after those before it."""

from __future__ import annotations

import numpy as np

from adapter_router.types import Array, Scoring


def token_logprobs(logits: Array, ids: Array) -> Scoring:
    """Answer for ``logits`` of shape (tokens, vocabulary): ``logits[i]`` predicts ``ids[i + 1]``.

    For an encoder-decoder, ``ids`` are the decoder's own input ids.
    """
    following = zip(logits[:-1], ids[1:].tolist(), strict=True)
    return {"token_logprobs": [None, *(_logprob(row, token) for row, token in following)]}


def _logprob(logits: Array, token: int) -> float:
    """log softmax(logits)[token] in float64; a row at a time, because a whole text's would not fit twice."""
    wide = logits.astype(np.float64)
    highest = wide.max()
    return float(wide[token] - highest - np.log(np.exp(wide - highest).sum()))
