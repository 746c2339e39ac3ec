"""NormalFloat of 2 and 3 bits: as NF4, with 4 and 8 levels, really packed into 16 and 24 bytes for 64 weights.

Levels (QLoRA, arXiv:2305.14314; LoftQ, arXiv:2310.08659): the normal quantiles of ``linspace(0.9677083, 0.5, n/2 + 1)``
above zero and of one fewer below, and zero itself, all over the largest. They are written out, because a base's
fingerprint must not depend on a machine's quantile function. Of two levels equally near, the lower is taken.

Neither bitsandbytes (4 and 8 bits only) nor torchao (one byte for each weight of 2 or 3 bits) stores them packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch.nn import functional

BLOCK = 64  # weights that share a scale
LEVELS: Mapping[int, tuple[float, ...]] = {
    2: (-1.0, 0.0, 0.33791524171829224, 1.0),
    3: (
        -1.0,
        -0.4786292016506195,
        -0.217141792178154,
        0.0,
        0.16093020141124725,
        0.33791524171829224,
        0.5626170039176941,
        1.0,
    ),
}
_TOGETHER = 4  # codes that one look-up turns into weights: a table of 2 ** (4 * bits) rows


def blocks_of(weight: torch.Tensor) -> torch.Tensor:
    """A matrix, row by row, as (blocks, 64), filled up with zeros."""
    flat = weight.reshape(-1)
    return functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def matrix_of(blocks: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix of ``shape`` that ``blocks_of`` took apart."""
    return blocks.reshape(-1)[: shape[0] * shape[1]].view(shape)


def quantize(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, 64) in float32 -> codes, uint8 (blocks, 8 * bits), and each block's largest size, float32 (blocks,)."""
    scales = blocks.abs().amax(dim=1)
    levels = torch.tensor(LEVELS[bits])
    relative = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return _pack(torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2, out_int32=True), bits), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """(blocks, 64) in float32, on the codes' device."""
    values = functional.embedding(_groups(codes, bits), _table(bits, codes.device))
    return values.view(-1, BLOCK).mul_(scales[:, None])


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(blocks, 64) codes -> (blocks, 8 * bits) bytes; the first code of a byte lies in its lowest bits."""
    groups = codes.view(len(codes), -1, 8)
    words = (groups << bits * torch.arange(8, dtype=torch.int32)).sum(dim=-1)
    bytes_ = [words >> 8 * place & 255 for place in range(bits)]
    return torch.stack(bytes_, dim=-1).to(torch.uint8).view(len(codes), -1)


def _groups(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes -> numbers of four codes each, in order."""
    if bits == 2:
        return packed.view(-1).int()
    low, middle, high = packed.view(-1, 3).int().unbind(dim=1)
    return torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], dim=1).view(-1)


@cache
def _table(bits: int, device: torch.device) -> torch.Tensor:
    """The four weights, in units of their scale, of every number that four codes make."""
    numbers = torch.arange(2 ** (_TOGETHER * bits))
    codes = torch.stack([numbers >> bits * place & 2**bits - 1 for place in range(_TOGETHER)], dim=1)
    return torch.tensor(LEVELS[bits])[codes].to(device)
