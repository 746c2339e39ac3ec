"""Ray's ``@serve.batch`` with PEFT's ``adapter_names``: mixed batches over adapters that are all loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from ray import serve

from adapter_router.config import RoutingConfig
from benchmarks.serving_peers.adapters import base_model, tokenizer

_Request = tuple[str, Sequence[str]]


class AdapterNames:
    """One replica; batches as ours: as many rows, and as long a wait for company."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        torch.set_num_threads(1)
        self._words: Any = tokenizer()
        names = list(directories)
        model = PeftModel.from_pretrained(base_model(), str(directories[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(str(directories[name]), adapter_name=name)
        self._model = model.eval()

    @serve.batch(  # type: ignore[untyped-decorator]  # Ray ships no usable types
        max_batch_size=RoutingConfig.max_batch_rows,
        batch_wait_timeout_s=RoutingConfig.batch_wait_s,
        batch_size_fn=lambda requests: sum(len(texts) for _, texts in requests),
    )
    async def infer(self, requests: Sequence[_Request]) -> list[NDArray[np.float32]]:
        """Logits of each request: texts under the adapter that it names."""
        texts = [text for _, texts in requests for text in texts]
        names = [name for name, texts in requests for _ in texts]
        with torch.inference_mode():
            batch = self._words(texts, padding=True, return_tensors="pt")
            logits = self._model(**batch, adapter_names=names).logits.numpy()
        ends = np.cumsum([len(texts) for _, texts in requests])
        return np.split(logits, ends[:-1])
