"""The catalog as plain dictionaries: what the real one is compared with, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from adapter_router.catalog.records import AdapterSpec, Alias, Phase, Registration, Target, Total, VersionRecord
from adapter_router.errors import (
    AdapterConflict,
    AdapterExists,
    AdapterFailed,
    AdapterNotFound,
    AdapterRouterError,
    AdapterUnavailable,
    InvalidRequest,
)
from adapter_router.types import AdapterVersion

UNDER_WAY = ("Registered", "Fetching", "Validating")
Look = tuple[int, Phase]
Meaning = tuple[tuple[tuple[AdapterVersion, int], ...], Registration | None] | None


@dataclass
class Adapter:
    uid: int
    registration: Registration
    began: int = 0
    versions: list[VersionRecord] = field(default_factory=list)
    claim: tuple[str, float] | None = None

    @property
    def spec(self) -> AdapterSpec:
        return self.registration.spec


@dataclass
class Name:
    own: bool
    targets: dict[tuple[int, int], int] = field(default_factory=dict)  # (uid, number) -> weight
    history: list[dict[tuple[int, int], int]] = field(default_factory=list)


class Model:
    """Every operation takes what the catalog's takes, and raises or returns what it should."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.adapters: dict[str, Adapter] = {}
        self.names: dict[str, Name] = {}
        self._uids = 0

    # -- registrations -------------------------------------------------------------------------------------------

    def register(self, spec: AdapterSpec, replace: bool = False, managed: bool = False) -> None:
        name = self.names.get(spec.name)
        if name is not None and not name.own:
            raise InvalidRequest("alias")
        if name is not None and not replace:
            raise AdapterExists("there")
        fresh = Registration(spec, "Registered", self.now, self.now, managed=managed)
        self._uids += 1
        if name is None:
            self.adapters[spec.name] = Adapter(self._uids, fresh, began=self._uids)
            self.names[spec.name] = Name(own=True)
            return
        old = self.adapters[spec.name]
        kept = {"created": old.registration.created, "managed": managed or old.registration.managed}
        old.registration = Registration(spec, "Registered", kept["created"], self.now, managed=kept["managed"])
        old.began = self._uids

    def remove(self, name: str) -> None:
        adapter = self._adapter(name)
        if any(uid == adapter.uid for other, n in self.names.items() if other != name for uid, _ in n.targets):
            raise InvalidRequest("led to")
        del self.adapters[name], self.names[name]

    def look(self, name: str) -> Look:
        """What somebody knows who reads the registration now."""
        adapter = self._adapter(name)
        return adapter.began, adapter.registration.phase

    def set_phase(
        self, name: str, phase: Phase, error: AdapterRouterError | None, retry_at: float | None, of: Look | None
    ) -> None:
        adapter = self._adapter(name)
        if _superseded(adapter, of):
            return
        values: dict[str, object] = {"phase": phase, "retry_at": retry_at, "updated": self.now}
        if phase not in ("Fetching", "Validating"):
            values |= {"reason": None, "problems": (), "code": None, "retryable": False}
            if error is not None:
                values |= {"reason": str(error), "problems": error.problems, "code": error.code}
                values |= {"retryable": error.retryable}
        adapter.registration = replace(adapter.registration, **values)  # type: ignore[arg-type]

    def flag(self, name: str, flag: str, value: bool) -> None:
        adapter = self._adapter(name)
        if getattr(adapter.spec, flag) != value:
            spec = replace(adapter.spec, **{flag: value})  # type: ignore[arg-type]
            adapter.registration = replace(adapter.registration, spec=spec, updated=self.now)

    def claim(self, name: str, owner: str, seconds: float) -> bool:
        adapter = self.adapters.get(name)
        if adapter is None or (adapter.claim and adapter.claim[0] != owner and adapter.claim[1] > self.now):
            return False
        adapter.claim = (owner, self.now + seconds)
        return True

    def release(self, name: str, owner: str) -> None:
        adapter = self.adapters.get(name)
        if adapter is not None and adapter.claim is not None and adapter.claim[0] == owner:
            adapter.claim = None

    def unfinished(self) -> set[str]:
        names = set()
        for name, adapter in self.adapters.items():
            reg = adapter.registration
            waits = reg.phase in UNDER_WAY and not (reg.spec.lazy and reg.phase == "Registered")
            again = reg.phase == "Failed" and reg.retry_at is not None and reg.retry_at <= self.now
            if (waits or again) and (adapter.claim is None or adapter.claim[1] <= self.now):
                names.add(name)
        return names

    # -- versions ------------------------------------------------------------------------------------------------

    def add_version(
        self, name: str, version: AdapterVersion, activate: bool | None, of: Look | None = None
    ) -> VersionRecord:
        adapter = self._adapter(name)
        if _superseded(adapter, of):
            raise AdapterConflict("news of the past")
        if version.source is not None and version.source != adapter.spec.source:
            raise AdapterConflict("another source")
        known = next((each for each in adapter.versions if _identity(each.version) == _identity(version)), None)
        if known is not None and known.retired is not None and activate is None:
            return known
        reg = adapter.registration
        adapter.registration = Registration(reg.spec, "Ready", reg.created, self.now, managed=reg.managed)
        before = len(adapter.versions)
        record = self._noted(adapter, version)
        if activate or (activate is None and len(adapter.versions) > before):
            self._lead(name, {(adapter.uid, record.number): 1})
        return record

    def _noted(self, adapter: Adapter, version: AdapterVersion) -> VersionRecord:
        for index, known in enumerate(adapter.versions):
            if _identity(known.version) == _identity(version):
                adapter.versions[index] = VersionRecord(known.number, version, known.created)
                return adapter.versions[index]
        adapter.versions.append(VersionRecord(len(adapter.versions) + 1, version, self.now))
        return adapter.versions[-1]

    def register_version(self, spec: AdapterSpec, version: AdapterVersion, replace: bool) -> VersionRecord:
        self.register(spec, replace=replace)
        return self.add_version(spec.name, version, activate=True)

    def retire(self, name: str, number: int) -> None:
        adapter = self._adapter(name)
        if not 1 <= number <= len(adapter.versions):
            raise AdapterNotFound("no such version")
        record = adapter.versions[number - 1]
        if record.retired is not None:
            return
        if any((adapter.uid, number) in n.targets for n in self.names.values()):
            raise InvalidRequest("led to")
        adapter.versions[number - 1] = replace(record, retired=self.now)

    # -- names ---------------------------------------------------------------------------------------------------

    def set_alias(self, name: str, weights: Mapping[str, int]) -> None:
        known = self.names.get(name)
        own = name if known is not None and known.own else None
        targets: dict[tuple[int, int], int] = {}
        for text, weight in weights.items():
            adapter, _, version = text.rpartition("@")
            found = self._addressed(adapter or own, version)
            if found is None or found in targets:
                raise InvalidRequest("no version, or twice")
            targets[found] = weight
        if not targets or not any(targets.values()):
            raise InvalidRequest("weights")
        if known is None:
            self.names[name] = Name(own=False)
        self._lead(name, targets)

    def rollback(self, name: str) -> None:
        known = self._name(name)
        if not known.history:
            raise InvalidRequest("nothing")
        for uid, number in known.history[-1]:
            owner = self._by_uid(uid)
            if owner is None or owner.versions[number - 1].retired is not None:
                raise InvalidRequest("gone")
        known.targets = known.history.pop()

    def remove_alias(self, name: str) -> None:
        if self._name(name).own:
            raise InvalidRequest("own")
        del self.names[name]

    def _lead(self, name: str, targets: dict[tuple[int, int], int]) -> None:
        known = self.names[name]
        if known.targets != targets:
            if known.targets:
                known.history.append(known.targets)
            known.targets = targets

    # -- what the catalog should show ----------------------------------------------------------------------------

    def shown(self, name: str) -> tuple[Target, ...]:
        """Of ``Alias``."""
        targets = []
        for (uid, number), weight in self.names[name].targets.items():
            owner = self._by_uid(uid)
            assert owner is not None
            targets.append(Target(owner.spec.name, number, weight))
        return tuple(sorted(targets, key=lambda target: (target.adapter, target.number)))

    def meaning(self, text: str) -> Meaning:
        """Of a name or an address."""
        name, at, version = text.partition("@")
        adapter = self.adapters.get(name)
        if at:
            found = self._addressed(name, version)
            if adapter is None or found is None or adapter.registration.phase == "Retired":
                return None
            return ((adapter.versions[found[1] - 1].version, 1),), adapter.registration
        if name not in self.names:
            return None
        if adapter is not None and adapter.registration.phase == "Retired":
            return (), adapter.registration
        choices = []
        for target in self.shown(name):
            if target.weight:
                choices.append((self.adapters[target.adapter].versions[target.number - 1].version, target.weight))
        return tuple(choices), None if adapter is None else adapter.registration

    def preloaded(self, base: str) -> dict[str, bool]:
        """Pinned or not, by digest."""
        wanted: dict[str, bool] = {}
        for name, adapter in self.adapters.items():
            meaning = self.meaning(name)
            if meaning is not None and (adapter.spec.pinned or adapter.spec.preload):
                for version, _ in meaning[0]:
                    if version.base == base:
                        wanted[version.digest] = wanted.get(version.digest, False) or adapter.spec.pinned
        return wanted

    def totals(self) -> dict[str, Total]:
        """Of unretired versions, by base."""
        totals: dict[str, Total] = {}
        for adapter in self.adapters.values():
            present = [record.version for record in adapter.versions if record.retired is None]
            for base in {version.base for version in present}:
                sizes = [version.num_bytes for version in present if version.base == base]
                known = totals.get(base, Total(0, 0, 0))
                more = (known.adapters + 1, known.versions + len(sizes), known.num_bytes + sum(sizes))
                totals[base] = Total(*more)
        return totals

    def reconcile(self, declared: Sequence[AdapterSpec]) -> None:
        for spec in declared:
            name = self.names.get(spec.name)
            if name is not None and not name.own:
                continue
            adapter = self.adapters.get(spec.name)
            if adapter is None:
                self.register(spec, managed=True)
                continue
            same_files = replace(spec, pinned=False, preload=False, lazy=False) == replace(
                adapter.spec, pinned=False, preload=False, lazy=False
            )
            if not adapter.registration.managed and adapter.spec.source != spec.source:
                continue
            if not same_files:
                self.register(spec, replace=True, managed=True)
            elif adapter.spec != spec or not adapter.registration.managed:
                adapter.registration = replace(adapter.registration, spec=spec, managed=True, updated=self.now)
        names = {spec.name for spec in declared}
        while True:
            before = len(self.adapters)
            for name in [n for n, adapter in self.adapters.items() if adapter.registration.managed and n not in names]:
                with suppress(InvalidRequest):
                    self.remove(name)
            if len(self.adapters) == before:
                return

    # -- looking things up ---------------------------------------------------------------------------------------

    def _adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise AdapterNotFound("no adapter")
        return self.adapters[name]

    def _name(self, name: str) -> Name:
        if name not in self.names:
            raise AdapterNotFound("no name")
        return self.names[name]

    def _by_uid(self, uid: int) -> Adapter | None:
        return next((adapter for adapter in self.adapters.values() if adapter.uid == uid), None)

    def _addressed(self, name: str | None, version: str) -> tuple[int, int] | None:
        adapter = self.adapters.get(name or "")
        if adapter is None:
            return None
        present = [record for record in adapter.versions if record.retired is None]
        if version.startswith("v"):
            matching = [record for record in present if f"v{record.number}" == version]
        else:
            matching = [record for record in present if record.version.digest.startswith(version)]
        if len({record.version.digest for record in matching}) != 1:
            return None
        return adapter.uid, matching[-1].number


def outcome(meaning: Meaning) -> set[object]:
    """What ``Routes.find`` may answer: versions, or the class of an error."""
    if meaning is None:
        return {AdapterNotFound}
    choices, registration = meaning
    if choices:
        return {version for version, _ in choices}
    assert registration is not None
    if registration.phase == "Retired":
        return {AdapterNotFound}
    if registration.phase != "Ready" and (registration.reason is None or registration.retryable):
        return {AdapterUnavailable}
    return {AdapterFailed}


def alias_of(model: Model, name: str, like: Alias) -> Alias:
    """``like`` as the model has it; revisions and times are the catalog's own."""
    return replace(like, targets=model.shown(name))


def _identity(version: AdapterVersion) -> tuple[object, ...]:
    return version.digest, version.base, version.task, version.labels


def _superseded(adapter: Adapter, of: Look | None) -> bool:
    if of is None:
        return False
    began, phase = of
    now = adapter.registration.phase
    return adapter.began != began or (now != phase and now in ("Ready", "Retired"))
