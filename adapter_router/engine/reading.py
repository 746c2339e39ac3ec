"""An adapter's files, or a mix's parts -> what they change at each module of the base, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_router.adapters.adapter_tensors import AdapterTensors
from adapter_router.adapters.convert import Converted, convert
from adapter_router.adapters.forms import Forms
from adapter_router.adapters.validate import Bases, Request, validate
from adapter_router.adapters.weighted_sum import Part, weighted_sum
from adapter_router.catalog.store import StoredAdapter
from adapter_router.engine.base_model import BaseModel
from adapter_router.errors import AdapterFailed, AdapterRejected, AdapterUnavailable
from adapter_router.types import AdapterFiles, AdapterVersion

Obtain = Callable[[AdapterVersion], StoredAdapter]
"""This node's copy of an adapter, fetched if need be. Raises AdapterUnavailable or AdapterFailed."""


@dataclass(frozen=True)
class Loaded:
    """What was made of the files; ``num_bytes`` on the device.

    Of a mix: ``tensors`` are those of its head, ``parts`` the digests of all its adapters.
    """

    tensors: AdapterTensors
    converted: Converted
    num_bytes: int
    parts: frozenset[str] = frozenset()


def admitted_copy(version: AdapterVersion) -> StoredAdapter:
    """The copy that was made when the adapter was admitted, on this node."""
    if version.directory is None:
        raise AdapterUnavailable(f"adapter {version.adapter!r} {version.digest} has no copy on this node")
    return StoredAdapter(version.digest, Path(version.directory))


class Reader:
    """Reads adapters for one base. Thread-safe: ``fetch`` waits for disks and networks, the others compute."""

    def __init__(self, base: BaseModel, obtain: Obtain = admitted_copy) -> None:
        self._base = base
        self._bases = Bases(base.tasks, lambda task: base.task(task).spec)
        self._obtain = obtain
        self._forms = Forms()

    def fetch(self, version: AdapterVersion) -> list[AdapterFiles]:
        """Files of the adapter, or of a mix's parts in their order; what goes wrong is told by the part's name.

        Raises AdapterUnavailable or AdapterFailed when a copy cannot be had.
        """
        if not version.parts:
            return [self._obtain(version).read()]
        files = []
        for part in version.parts:
            try:
                files.append(self._obtain(part.version).read())
            except (AdapterUnavailable, AdapterFailed) as error:
                raise type(error)(f"{part.version.adapter}: {error}") from error
        return files

    def read(self, files: AdapterFiles, request: Request) -> Loaded:
        """Raises AdapterRejected with every problem."""
        tensors = validate(files, self._bases, request, self._forms)
        return self._loaded(tensors, convert(tensors, self._base.task(tensors.task).weights))

    def read_version(self, version: AdapterVersion, files: Sequence[AdapterFiles]) -> Loaded:
        """``read`` as the catalog knows the adapter, or the mix; ``files`` as ``fetch`` gives them."""
        if version.parts:
            return self._mix(version, files)
        return self.read(files[0], request_of(version))

    def _mix(self, version: AdapterVersion, files: Sequence[AdapterFiles]) -> Loaded:
        read = [self._part(part.version, own) for part, own in zip(version.parts, files, strict=True)]
        parts = list(zip(version.parts, read, strict=True))
        activated = [part.version.adapter for part, one in parts if one.tensors.invocation]
        if activated:
            raise AdapterRejected.because([f"{name} acts from an invocation on (aLoRA): no mix" for name in activated])
        named = [Part(part.version.adapter, one.converted.delta, part.weight) for part, one in parts]
        head = next(index for index, part in enumerate(version.parts) if part.is_head)
        base = self._base.task(read[head].tensors.task)
        total = Converted(weighted_sum(named, head, base.spec, base.weights), ())
        digests = frozenset(part.version.digest for part in version.parts)
        return replace(self._loaded(read[head].tensors, total), parts=digests)

    def _part(self, version: AdapterVersion, files: AdapterFiles) -> Loaded:
        try:
            return self.read(files, request_of(version))
        except AdapterRejected as error:
            raise AdapterRejected.because([f"{version.adapter}: {problem}" for problem in error.problems]) from error

    def _loaded(self, tensors: AdapterTensors, converted: Converted) -> Loaded:
        return Loaded(tensors, converted, converted.delta.device_bytes(self._base.dtype))


def request_of(version: AdapterVersion) -> Request:
    """What was said when the version was admitted."""
    return Request(version.task, version.labels or None)
