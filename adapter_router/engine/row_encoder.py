"""Which encoder turns a base's rows into its model's features."""

from __future__ import annotations

from dataclasses import replace

import torch

from adapter_router.engine.base_files import input_limits, read_tokenizer
from adapter_router.engine.images import ImageEncoder
from adapter_router.engine.inputs import RowEncoder, TextEncoder
from adapter_router.engine.probe import zeros_are_default
from adapter_router.engine.task_model import TaskModel

_OPTIONAL = ("token_type_ids",)  # features that a row may leave out
_TOKENS = 5


def row_encoder(source: str, model: TaskModel, device: torch.device) -> RowEncoder:
    """The encoder for the checkpoint ``source``, of which ``model`` shows what may be left out."""
    config = model.config
    if model.model.main_input_name == "pixel_values":
        return ImageEncoder(source, getattr(config, "vision_config", None) or config)
    tokenizer = read_tokenizer(source)
    limits = input_limits(model.model, tokenizer)
    start = config.decoder_start_token_id if config.is_encoder_decoder else None
    encoder = TextEncoder(tokenizer, limits, start)
    sample = encoder.collate(encoder.samples(1, _TOKENS), device)
    with torch.inference_mode():
        kept = tuple(
            name
            for name in limits.features
            if name not in _OPTIONAL or zeros_are_default(lambda batch: model.run(batch, 0), sample, name)
        )
    return TextEncoder(tokenizer, replace(limits, features=kept), start)
