"""The pristine base's weights, and factorisations of them that initialisations are undone with.

A factorisation belongs to the base, not to an adapter: one serves every adapter of up to its rank. All in float64;
signs of singular vectors differ between drivers, their product does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapter_router.adapters.base_spec import TargetSpec
from adapter_router.adapters.tuners.tuner import Factors

_KEPT = 32  # vectors kept of each factorisation, at least
_GIVE_INITIAL = (
    "put the adapter as it was before training into initial/, convert it with PEFT's "
    "save_pretrained(path_initial_model_for_weight_conversion=...), or "
)
_FLOAT32 = 6e-8  # rounding of the float32 factorisation that the adapter was trained with


@dataclass(frozen=True)
class _Spectrum:
    """Singular values in ascending order; ``vectors`` (side, kept) belong to one end of them."""

    values: torch.Tensor
    vectors: torch.Tensor


class BaseWeights:
    """Read-only access by module path. Not thread-safe: its owner is the loader thread.

    Of a quantised module's weight everything is what is served, the dequantised; only factorisations are refused.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        targets: Mapping[str, TargetSpec],
        quantized: frozenset[str] = frozenset(),
    ) -> None:
        """``parameters`` by name; only ever read. ``quantized``: modules whose weight is."""
        self._parameters = parameters
        self._targets = targets
        self._quantized = quantized
        self._spectra: dict[tuple[str, bool], _Spectrum] = {}
        self._bases: dict[str, torch.Tensor] = {}

    def weight(self, path: str) -> torch.Tensor:
        """Float32 on the host; (out, in) of a linear layer whatever its storage."""
        weight = self._parameters[f"{path}.weight"].detach().to("cpu", torch.float32)
        return weight.t() if self._targets[path].transposed else weight

    def bias(self, path: str) -> torch.Tensor | None:
        """Float32 on the host."""
        bias = self._parameters.get(f"{path}.bias")
        return None if bias is None else bias.detach().to("cpu", torch.float32)

    def parameter(self, name: str) -> torch.Tensor | None:
        """A parameter as the base holds it."""
        return self._parameters.get(name)

    def parameters_of(self, path: str) -> dict[str, torch.Tensor]:
        """All parameters of a module by their names inside it."""
        inside = path + "."
        return {n.removeprefix(inside): self._parameters[n] for n in self._parameters if n.startswith(inside)}

    def is_quantized(self, path: str) -> bool:
        """Whether the weight of the module ``path`` is rounded to few bits."""
        return path in self._quantized

    def largest(self, path: str, rank: int) -> Factors:
        """PiSSA's principal part. Raises ValueError when the spectrum has no gap there."""
        self._check_pristine(path, _GIVE_INITIAL)
        return self._component(path, rank, largest=True)

    def smallest(self, path: str, rank: int) -> Factors:
        """What KaSA's truncation drops."""
        self._check_pristine(path, "")
        return self._component(path, rank, largest=False)

    def column_basis(self, path: str, rank: int) -> Factors:
        """OLoRA's part: QR of the first columns is the QR of the whole, cut."""
        self._check_pristine(path, _GIVE_INITIAL)
        if self._targets[path].transposed:
            raise ValueError(f"OLoRA on {path}: PEFT's factors of a transposed layer do not fit it")
        if path not in self._bases or self._bases[path].shape[1] < rank:
            columns = self.weight(path)[:, : max(rank, _KEPT)].double()
            self._bases[path] = torch.linalg.qr(columns).Q
        basis = self._bases[path][:, :rank]
        return Factors((basis.t() @ self.weight(path).double()).float(), basis.float())

    def _check_pristine(self, path: str, remedy: str) -> None:
        """What training took out of a full-precision weight is no part of the rounded one."""
        if path in self._quantized:
            raise ValueError(
                f"{path} is quantised on this base: what training took out of the full-precision weight cannot be told "
                f"from it; {remedy}leave the module at 16 bits"
            )

    def _component(self, path: str, rank: int, largest: bool) -> Factors:
        weight = self.weight(path).double()
        spectrum = self._spectrum(path, weight, rank, largest)
        vectors = spectrum.vectors[:, -rank:] if largest else spectrum.vectors[:, :rank]
        uncertainty = _uncertainty(spectrum.values, rank, largest)
        if weight.shape[0] < weight.shape[1]:  # left singular vectors
            return Factors((vectors.t() @ weight).float(), vectors.float(), uncertainty)
        return Factors(vectors.t().float(), (weight @ vectors).float(), uncertainty)

    def _spectrum(self, path: str, weight: torch.Tensor, rank: int, largest: bool) -> _Spectrum:
        """Eigenvectors of the smaller Gram matrix: in float64 exact enough for the float32 weights it is made of."""
        known = self._spectra.get((path, largest))
        if known is not None and known.vectors.shape[1] >= rank:
            return known
        wide = weight.shape[0] < weight.shape[1]
        values, vectors = torch.linalg.eigh(weight @ weight.t() if wide else weight.t() @ weight)
        kept = max(rank, _KEPT)
        vectors = vectors[:, -kept:] if largest else vectors[:, :kept]
        spectrum = _Spectrum(values.clamp(min=0).sqrt(), vectors.clone())
        self._spectra[path, largest] = spectrum
        return spectrum


def _uncertainty(values: torch.Tensor, rank: int, largest: bool) -> float:
    """How far two float32 drivers may differ in the component: rounding times norm over gap (Wedin's bound)."""
    if rank >= len(values):
        return 0.0
    cut = len(values) - rank if largest else rank
    gap = float(values[cut] - values[cut - 1])
    return _FLOAT32 * float(values[-1]) / max(gap, 1e-300)
