"""What a model is asked when it is read: sample rows run through it, and what they show of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from adapter_router.engine.inputs import EncodedRow, RowEncoder, TextEncoder
from adapter_router.engine.probe import Batch, padding_error
from adapter_router.engine.task_model import TaskModel

logger = logging.getLogger(__name__)

_SAMPLES = 6


class Trials:
    """Sample rows of one base. The caller keeps everybody else from running its models meanwhile."""

    def __init__(self, base: str, encoder: RowEncoder, device: torch.device, dtype: torch.dtype) -> None:
        """``base``: its name, for messages."""
        self._base = base
        self._encoder = encoder
        self._device = device
        self._dtype = dtype
        self._tolerance = 1e-3 if dtype == torch.float32 else 0.2  # half precision alone moves small logits by percents
        self.padding = encoder.padding(encoder.samples(_SAMPLES, None))

    def batch(self, count: int = _SAMPLES) -> Batch:
        """Sample rows, padded: a batch without padding would leave masks out."""
        return self._collate(self._encoder.samples(count, None))

    def runner(self, model: TaskModel) -> Callable[[Batch], torch.Tensor]:
        """Runs ``model`` on sample rows."""
        return lambda batch: model.run(batch, self.padding)

    def check_padding(self, model: TaskModel) -> None:
        """Raise ValueError for an architecture that cannot be batched exactly."""
        if getattr(model.config, "attention_type", None) == "block_sparse":
            raise ValueError(
                f"base {self._base!r}: its sparse attention depends on the batch's length; set attention_type to "
                '"original_full" in its config.json'
            )
        rows = self._encoder.samples(3, None)
        try:
            run = self.runner(model)
            alone = [run(self._collate([row]))[0].float() for row in rows]
            together = [raw[: len(one)].float() for raw, one in zip(run(self._collate(rows)), alone, strict=True)]
        except Exception as failure:
            raise ValueError(f"base {self._base!r} cannot run a padded batch of rows: {failure}") from failure
        error = padding_error(alone, together)
        if not error <= self._tolerance:
            raise ValueError(
                f"base {self._base!r} ({model.config.model_type}): padding moves its logits by {error:.1e} of their "
                "size, so rows of different length cannot share a batch exactly"
            )

    def keeps_masked_rows(self, model: TaskModel) -> bool:
        """Whether a row whose first token is masked answers alike alone and beside longer ones."""
        short, *longer = self._encoder.samples(3, None)
        mask = short.features["attention_mask"].copy()
        mask[0] = 0
        masked = replace(short, features={**short.features, "attention_mask": mask})
        run = self.runner(model)
        alone = run(self._collate([masked]))[0].float()
        beside = run(self._collate([masked, *longer]))[0].float()[: len(alone)]
        return padding_error([alone], [beside]) <= self._tolerance

    def pads_left(self, model: TaskModel) -> bool:
        """Whether two steps of generation give the same logits for prompts alone and padded on the left."""
        encoder = self._encoder
        assert isinstance(encoder, TextEncoder)

        def steps(rows: Sequence[EncodedRow]) -> torch.Tensor:
            batch = encoder.collate(rows, self._device, "left")
            features = {name: batch[name] for name in ("input_ids", "attention_mask")}
            done = model.model.generate(
                **features,
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            return torch.stack(done.logits, dim=1).float()

        rows = encoder.samples(3, None)
        try:
            error = padding_error([steps([row])[0] for row in rows], list(steps(rows)))
        except Exception:
            logger.info("base %s cannot continue padded prompts: each length runs by itself", self._base, exc_info=True)
            return False
        return error <= self._tolerance

    def _collate(self, rows: Sequence[EncodedRow]) -> Batch:
        features = self._encoder.collate(rows, self._device)
        return {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in features.items()}
