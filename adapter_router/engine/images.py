"""Images -> pixel values -> one batch."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from adapter_router.engine.inputs import EncodedRow
from adapter_router.engine.probe import Batch
from adapter_router.errors import InvalidRequest
from adapter_router.types import Array, Row

_PIXELS = "pixel_values"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_MAX_IMAGE_PIXELS = 32 << 20
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageEncoder:
    """Decodes and prepares images as the base's own processor does. Thread-safe."""

    max_tokens = 0

    def __init__(self, source: str, config: Any) -> None:
        """``config``: the vision model's."""
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self._shape = (config.num_channels, height, width)
        found = any((Path(source) / name).exists() for name in _PROCESSOR_FILES) or not Path(source).is_dir()
        self._processor: Any = AutoImageProcessor.from_pretrained(source, use_fast=False) if found else None
        self._lock = threading.Lock()

    def encode(self, row: Row, prefix: str = "") -> EncodedRow:  # noqa: ARG002 - texts have prefixes
        """Raises InvalidRequest for what is no image of the size and kind the base takes."""
        if isinstance(row.inputs, bytes):
            pixels = self._decode(row.inputs)
        elif isinstance(row.inputs, Mapping):
            pixels = self._checked(row.inputs)
        else:
            raise InvalidRequest("this base takes images, not texts: send an encoded image or pixel_values", "inputs")
        return EncodedRow({_PIXELS: pixels}, 0, 1)

    def collate(self, rows: Sequence[EncodedRow], device: torch.device) -> Batch:
        """(rows, channels, height, width)"""
        return {_PIXELS: torch.from_numpy(np.stack([row.features[_PIXELS] for row in rows])).to(device)}

    def padding(self, rows: Sequence[EncodedRow]) -> int | None:  # noqa: ARG002 - images are not filled up
        """None: there are no tokens."""
        return None

    def samples(self, count: int, tokens: int | None) -> list[EncodedRow]:  # noqa: ARG002 - images have no tokens
        """Images of noise."""
        noise = np.random.default_rng(0).standard_normal((count, *self._shape), dtype=np.float32)
        return [EncodedRow({_PIXELS: pixels}, 0, 1) for pixels in noise]

    def detokenize(self, ids: Sequence[int]) -> str | None:  # noqa: ARG002 - images are not generated
        """None: there are no tokens."""
        return None

    def _decode(self, content: bytes) -> Array:
        if self._processor is None:
            raise InvalidRequest("this base model has no image processor; send pixel_values", "inputs")
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                if image.width * image.height > _MAX_IMAGE_PIXELS:
                    raise InvalidRequest(
                        f"the image has {image.width} x {image.height} pixels, at most {_MAX_IMAGE_PIXELS} are read",
                        "inputs",
                    )
                decoded = ImageOps.exif_transpose(image).convert(_MODES.get(self._shape[0], "RGB"))
        except InvalidRequest:
            raise
        except Exception as error:  # decoders of broken files raise whatever they like
            raise InvalidRequest(
                f"the input is not an image that can be read ({', '.join(_FORMATS)}): {error}", "inputs"
            ) from error
        with self._lock:
            prepared = self._processor(images=decoded, return_tensors="np")
        return self._checked({_PIXELS: prepared[_PIXELS][0]})

    def _checked(self, inputs: Mapping[str, Array]) -> Array:
        if set(inputs) != {_PIXELS}:
            raise InvalidRequest(f"features must be {_PIXELS} and nothing else, got {sorted(inputs)}", "inputs")
        try:
            pixels = np.asarray(inputs[_PIXELS], dtype=np.float32)
        except (TypeError, ValueError):
            pixels = np.empty(0, dtype=np.float32)
        if pixels.shape != self._shape:
            raise InvalidRequest(
                f"{_PIXELS} has shape {list(pixels.shape)}, this model takes {list(self._shape)}", "inputs"
            )
        if not np.isfinite(pixels).all():
            raise InvalidRequest(f"{_PIXELS} holds NaN or infinite values", "inputs")
        return pixels
