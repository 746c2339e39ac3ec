"""LoftQ (arXiv:2310.08659, algorithm 1) of one matrix: a quantised Q and low-rank factors with Q + B A close to W.

    A_0 = B_0 = 0;  T times:  Q_t = quantise(W - B_{t-1} A_{t-1}),  U S V^T = svd(W - Q_t),
                              B_t = U_r sqrt(S_r),  A_t = sqrt(S_r) V_r^T

In float32, as PEFT's ``loftq_init`` (0.21) does, whose results these are. Per layer, so each may have bits of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapter_router.quantization.schemes import Packed, pack, unpack


@dataclass(frozen=True)
class LoftQ:
    """``a`` (rank, in) and ``b`` (out, rank), float32; the adapter's scaling is 1."""

    packed: Packed
    a: torch.Tensor
    b: torch.Tensor


def loftq(weight: torch.Tensor, bits: int, rank: int, iterations: int, device: str = "cpu") -> LoftQ:
    """Decompose a (out, in) matrix of at least ``rank`` rows and columns; ``iterations`` is at least 1.

    ``device`` computes the decompositions; the results are on the host. Raises ValueError as ``pack``.
    """
    weight = weight.detach().to("cpu", torch.float32)
    rest = weight
    for last in range(iterations - 1, -1, -1):
        packed = pack(rest, bits)
        error = (weight - unpack(packed, torch.float32)).to(device)
        left, sizes, right = torch.linalg.svd(error, full_matrices=False)
        roots = sizes[:rank].sqrt()
        b, a = (left[:, :rank] * roots).cpu(), (roots[:, None] * right[:rank]).cpu()
        if last:
            rest = weight - b @ a
    return LoftQ(packed, a.contiguous(), b.contiguous())
