"""Ray's ``@serve.multiplexed`` with PEFT's ``set_adapter``: one adapter at a time, a bounded number of them loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from ray import serve

from benchmarks.serving_peers.adapters import base_model, tokenizer

CACHED = 32  # adapters a replica has room for: also what ours gets, in bytes
_UNUSED = "unused"


class _Loaded:
    """An adapter on a PeftModel; dropped, as Ray's documentation wants it, when Serve evicts this object."""

    def __init__(self, model: PeftModel, name: str, directory: Path) -> None:
        self._model = model
        self._name = name
        model.load_adapter(str(directory), adapter_name=name)

    def __del__(self) -> None:
        self._model.delete_adapter(self._name)


class SetAdapter:
    """One replica. Forwards run in its event loop: nothing else could run beside them on its one thread."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        torch.set_num_threads(1)
        self._directories = directories
        self._words: Any = tokenizer()
        lora = LoraConfig(task_type="SEQ_CLS", r=1, target_modules=["query", "value"])
        self._model = get_peft_model(base_model(), lora, adapter_name=_UNUSED).eval()

    @serve.multiplexed(max_num_models_per_replica=CACHED)  # type: ignore[untyped-decorator]  # Ray ships no usable types
    async def adapter(self, name: str) -> _Loaded:
        return _Loaded(self._model, name, self._directories[name])

    async def infer(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Logits of ``texts`` under the adapter that the call names as its multiplexed model."""
        name = serve.get_multiplexed_model_id()
        await self.adapter(name)
        while name not in self._model.peft_config:  # Serve evicts what it has just loaded for somebody
            await self.adapter(name)
        self._model.set_adapter(name)
        with torch.inference_mode():
            batch = self._words(list(texts), padding=True, return_tensors="pt")
            logits: NDArray[np.float32] = self._model(**batch).logits.numpy()
        return logits
