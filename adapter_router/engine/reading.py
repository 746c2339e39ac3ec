"""An adapter's files, or a mix's parts -> what they change at each module of the base. On the host, by one thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_router.adapters.convert import Converted, convert
from adapter_router.adapters.validate import AdapterTensors, Bases, Request, validate
from adapter_router.adapters.weighted_sum import Part, weighted_sum
from adapter_router.catalog.store import StoredAdapter
from adapter_router.engine.base_model import BaseModel
from adapter_router.errors import AdapterRejected, AdapterUnavailable
from adapter_router.types import AdapterVersion, MixPart


@dataclass(frozen=True)
class Loaded:
    """What was made of the files; ``num_bytes`` on the device.

    Of a mix: ``tensors`` are those of its head, ``parts`` the digests of all its adapters.
    """

    tensors: AdapterTensors
    converted: Converted
    num_bytes: int
    parts: frozenset[str] = frozenset()


class Reader:
    """Reads adapters for one base. Not thread-safe."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._bases = Bases(base.tasks, lambda task: base.task(task).spec)

    def read(self, stored: StoredAdapter, request: Request) -> Loaded:
        """Raises AdapterRejected with every problem, AdapterUnavailable when the copy cannot be read."""
        tensors = validate(stored.read(), self._bases, request)
        return self._loaded(tensors, convert(tensors, self._base.task(tensors.task).weights))

    def read_version(self, version: AdapterVersion) -> Loaded:
        """``read`` as the catalog knows the adapter, or the mix."""
        if version.directory is not None:
            stored = StoredAdapter(version.digest, Path(version.directory))
            return self.read(stored, Request(version.task, version.labels or None))
        return self._mix(version.parts)

    def _mix(self, parts: Sequence[MixPart]) -> Loaded:
        read = [self._part(part.version) for part in parts]
        activated = [part.version.adapter for part, one in zip(parts, read, strict=True) if one.tensors.invocation]
        if activated:
            raise AdapterRejected.because([f"{name} acts from an invocation on (aLoRA): no mix" for name in activated])
        named = [Part(p.version.adapter, r.converted.delta, p.weight) for p, r in zip(parts, read, strict=True)]
        head = next(index for index, part in enumerate(parts) if part.is_head)
        base = self._base.task(read[head].tensors.task)
        total = Converted(weighted_sum(named, head, base.spec, base.weights), ())
        return replace(self._loaded(read[head].tensors, total), parts=frozenset(p.version.digest for p in parts))

    def _part(self, version: AdapterVersion) -> Loaded:
        """``read_version``; what goes wrong is told by the part's name."""
        try:
            return self.read_version(version)
        except AdapterRejected as error:
            raise AdapterRejected.because([f"{version.adapter}: {problem}" for problem in error.problems]) from error
        except AdapterUnavailable as error:
            raise AdapterUnavailable(f"{version.adapter}: {error}") from error

    def _loaded(self, tensors: AdapterTensors, converted: Converted) -> Loaded:
        return Loaded(tensors, converted, converted.delta.device_bytes(self._base.dtype))
