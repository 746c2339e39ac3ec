"""How a weight matrix of each width is stored. All schemes are weight-only, deterministic and alike on every device.

8 bits: bitsandbytes' vectorwise int8, one scale a row (of the weight rounded to float16 first, as its kernels want).
4 bits: bitsandbytes' NF4 (QLoRA, arXiv:2305.14314), one scale for 64 weights. 3 and 2 bits: ``normal_float``.

bitsandbytes' own layers are not used. ``Linear8bitLt`` rounds the inputs, too, and chooses the columns it leaves out by
the largest input of the whole batch, so that a row's answer would depend on its neighbours. ``Linear4bit`` chooses its
kernel by the number of rows and, where a CPU can, multiplies in bfloat16. Here every row runs through the base's own
product with the same dequantised weight.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from adapter_router.quantization import normal_float
from adapter_router.quantization.scratch import room_for

_BLOCK = normal_float.BLOCK
# Weights of which copies are made at a time: so few stay in the processor's cache, and leave no holes in the heap.
_TOGETHER = 1 << 18
_SMALL = 1 << 20  # weights of a matrix that may as well be made whole
_KERNELS_LOG = "bitsandbytes.backends.cpu.ops"
LIBRARY = "bitsandbytes"
LIBRARY_BITS = (4, 8)


@dataclass(frozen=True)
class Packed:
    """A quantised matrix of ``shape`` (out, in).

    ``codes``: int8 (out, in) at 8 bits, else uint8 (blocks, bytes of 64 weights); the matrix, row by row, is filled up
    with zeros to whole blocks. ``scales``: float32, the largest size in each row (8 bits) or block.
    """

    bits: int
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def pack(weight: torch.Tensor, bits: int) -> Packed:
    """Quantise a floating (out, in) matrix on the host to 2, 3, 4 or 8 bits.

    Raises ValueError for a weight that is not finite, at 8 bits in float16, and where bitsandbytes is not installed.
    """
    weight = weight.detach().to("cpu")
    shape = (weight.shape[0], weight.shape[1])
    rows = weight if bits == 8 else normal_float.blocks_of(weight)
    parts = []
    for part in torch.split(rows, max(1, _TOGETHER // rows.shape[1])):
        rounded = part.float().half() if bits == 8 else part.float()
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError("the weight is not finite" + (" in float16" if bits == 8 else ""))
        parts.append(_SCHEMES[bits].quantize(rounded.contiguous()))
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Packed(bits, shape, codes, scales)


def unpack(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The dequantised (out, in) matrix: computed in float32, rounded to ``dtype`` once."""
    dequantize, width = _SCHEMES[packed.bits].dequantize, packed.codes[0].numel() * 8 // packed.bits
    if packed.codes.device.type != "cpu" or len(packed.scales) * width <= _SMALL:
        rows = dequantize(packed.codes, packed.scales).to(dtype)
        return rows if packed.bits == 8 else normal_float.matrix_of(rows, packed.shape)
    rows = room_for("rows", (len(packed.scales), width), packed.codes, dtype)
    pieces = (torch.split(t, max(1, _TOGETHER // width)) for t in (rows, packed.codes, packed.scales))
    for piece, codes, scales in zip(*pieces, strict=True):
        piece.copy_(dequantize(codes, scales))
    return rows if packed.bits == 8 else normal_float.matrix_of(rows, packed.shape)


def stored_shapes(bits: int, shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``codes`` and ``scales`` of a matrix of ``shape``."""
    if bits == 8:
        return shape, (shape[0],)
    blocks = -(-shape[0] * shape[1] // _BLOCK)
    return (blocks, _BLOCK * bits // 8), (blocks,)


def missing_library(widths: set[int]) -> list[str]:
    """What has to be installed for ``widths``, as problems."""
    if widths.isdisjoint(LIBRARY_BITS) or importlib.util.find_spec(LIBRARY) is not None:
        return []
    return [f"4 and 8 bits need {LIBRARY}: pip install 'adapter-router[quantization]'"]


@dataclass(frozen=True)
class _Scheme:
    """Of some rows (8 bits, float16) or blocks (float32) of a matrix: to codes and scales, and back to float32."""

    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    dequantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@cache
def _library() -> Any:
    """bitsandbytes' functions. Raises ValueError when it is not installed."""
    if problems := missing_library(set(LIBRARY_BITS)):
        raise ValueError(problems[0])
    # While it is imported it warns of a kernel for bfloat16 products, which are not used here.
    logger = logging.getLogger(_KERNELS_LOG)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional  # noqa: PLC0415 - seconds, and only for those who quantise
    finally:
        logger.setLevel(level)
    return functional


def _quantize_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales, _ = _library().int8_vectorwise_quant(rows)
    codes[scales == 0] = 0  # a row of zeros is 0/0: what that is as an integer depends on the machine
    return codes, scales


def _dequantize_int8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = _library().int8_vectorwise_dequant(codes, scales)
    return rows


def _quantize_nf4(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Whole blocks as rows: of other rows the library's kernel for the CPU (0.50.2) mixes up the scales, in silence.
    codes, state = _library().quantize_4bit(blocks, blocksize=_BLOCK, compress_statistics=False, quant_type="nf4")
    return codes.view(-1, _BLOCK // 2), state.absmax


def _dequantize_nf4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    state = _library().QuantState(scales, torch.Size((len(scales), _BLOCK)), None, _BLOCK, "nf4", torch.float32)
    blocks: torch.Tensor = _library().dequantize_4bit(codes.reshape(-1, 1), state)
    return blocks


_SCHEMES: Mapping[int, _Scheme] = {
    8: _Scheme(_quantize_int8, _dequantize_int8),
    4: _Scheme(_quantize_nf4, _dequantize_nf4),
    3: _Scheme(partial(normal_float.quantize, bits=3), partial(normal_float.dequantize, bits=3)),
    2: _Scheme(partial(normal_float.quantize, bits=2), partial(normal_float.dequantize, bits=2)),
}
