"""Device and host tier against a naive model: nothing is lost, nothing is held twice, and the news are true."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.tiers import Tiers
from adapter_router.engine.transfer import Transfer
from adapter_router.errors import InvalidRequest
from adapter_router.metrics import EngineMetrics

DEVICE, HOST = 60, 40
PARTS = ["a0", "a1", "a2"]


def adapter(digest: str, num_bytes: int, parts: frozenset[str] = frozenset()) -> ResidentAdapter:
    return ResidentAdapter(digest, "text-classification", {}, {}, 2, num_bytes, 0, parts=parts)


def tiers(device: int = DEVICE, host: int = HOST) -> Tiers:
    return Tiers(device, host, Transfer(torch.device("cpu")), EngineMetrics(), clock=lambda: 0.0)


class TiersMachine(RuleBasedStateMachine):
    """``leases`` counts what is out; followers fold the news they asked for, each at its own pace."""

    def __init__(self) -> None:
        super().__init__()
        self.tiers = tiers()
        self.made: dict[str, ResidentAdapter] = {}
        self.leases: dict[str, int] = {}
        self.dropped: set[str] = set()
        self.pinned: set[str] = set()
        self.followers: list[tuple[int, set[str]]] = [(0, set()), (0, set())]

    def _present(self) -> set[str]:
        return {held.digest for held in self.tiers.held()}

    def _device(self) -> set[str]:
        return set(self.tiers.resident())

    @rule(
        number=st.integers(0, 7),
        num_bytes=st.integers(1, 30),
        is_mix=st.booleans(),
        to=st.sampled_from(["device", "host", "free room"]),
        seconds=st.floats(0, 10),
        uses=st.integers(0, 5),
    )
    def load(self, number: int, num_bytes: int, is_mix: bool, to: str, seconds: float, uses: int) -> None:
        digest = f"{'m' if is_mix else 'a'}{number}"
        if digest not in self.made:
            self.made[digest] = adapter(digest, num_bytes, frozenset(PARTS[: number % 4] if is_mix else ()))
        loaded = self.made[digest]
        if uses:
            self.tiers.popularity.used(digest, uses)
        self.tiers.popularity.loaded(digest, loaded.num_bytes, seconds)
        before, device = self._present(), self._device()
        if to == "device":
            idle = {known for known in device if not self.leases.get(known) and known not in self.pinned}
            if self.tiers.install(loaded):
                assert digest in self._device() and device - self._device() <= idle
            else:
                assert self._device() == device and (digest in self.dropped or self.leases or self.pinned)
        else:
            self.tiers.keep(loaded, into_free_room=to == "free room")
            assert self._device() == device
            assert to == "host" or self._present() >= before, "nobody goes for what only wants free room"

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.made)))
        was_there, was_dropped = digest in self.tiers, digest in self.dropped
        leased = self.tiers.lease(digest)
        if leased is None:
            assert not was_there or was_dropped or self.leases or self.pinned, "room could have been made"
            return
        assert leased.digest == digest and was_there and not was_dropped
        self.leases[digest] = self.leases.get(digest, 0) + 1

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.leases)))
        self.tiers.release(digest)
        self.leases[digest] -= 1
        if not self.leases[digest]:
            del self.leases[digest]
            if digest in self.dropped:
                self.dropped.remove(digest)
                self.pinned.discard(digest)
                assert digest not in self.tiers

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.made)))
        gone = {known for known in self._present() if known == digest or digest in self.made[known].parts}
        self.tiers.drop(digest)
        self.dropped |= gone & self.leases.keys()
        self.pinned -= gone - self.leases.keys()
        assert self._present() & gone == gone & self.leases.keys(), "only what is in use stays, until it is not"

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.leases)))
        try:
            self.tiers.pin(digest)
            self.pinned.add(digest)
        except InvalidRequest:
            held = sum(self.made[known].num_bytes for known in self.pinned)
            assert held + self.made[digest].num_bytes > 0.8 * DEVICE

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.made)))
        self.tiers.unpin(digest)
        self.pinned.discard(digest)

    @rule(which=st.integers(0, 1))
    def follow(self, which: int) -> None:
        revision, known = self.followers[which]
        change = self.tiers.changes(revision)
        known = set(change.added) if change.complete else (known - change.removed) | change.added
        self.followers[which] = change.revision, known
        assert known == self._present()
        assert not change.added & change.removed

    @invariant()
    def books_balance(self) -> None:
        self.tiers.check_integrity()
        held = {held.digest: held for held in self.tiers.held()}
        assert {digest: one.leases for digest, one in held.items() if one.leases} == self.leases
        assert {digest for digest, one in held.items() if one.pinned} == self.pinned
        assert all(held[digest].tier == "device" for digest in (*self.leases, *self.pinned))
        sizes = {tier: sum(one.num_bytes for one in held.values() if one.tier == tier) for tier in ("device", "host")}
        capacity = self.tiers.capacity()
        assert (capacity.device_used, capacity.host_used) == (sizes["device"], sizes["host"])
        assert sizes["device"] <= DEVICE and sizes["host"] <= HOST


TestTiers = TiersMachine.TestCase
TestTiers.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


def test_what_is_evicted_goes_down_and_comes_up_again_without_a_load() -> None:
    both = tiers(device=20, host=20)
    for digest in ("a", "b", "c"):
        assert both.install(adapter(digest, 10))
    assert {held.digest: held.tier for held in both.held()} == {"a": "host", "b": "device", "c": "device"}
    assert both.changes(0).added == {"a", "b", "c"}
    before = both.changes(0).revision
    assert both.lease("a") is not None
    assert sorted(both.resident()) == ["a", "c"] and both.changes(before).revision == before, "all are still there"


def test_what_nobody_asks_for_flushes_nobody() -> None:
    """A scan: each adapter once. Those that are wanted again and again stay, on the device and below."""
    both = tiers(device=30, host=20)
    hot = [f"hot{number}" for number in range(4)]
    for digest in hot * 5:
        both.popularity.used(digest)
        if both.lease(digest) is None:
            both.popularity.loaded(digest, 10, 0.01)
            assert both.install(adapter(digest, 10))
            assert both.lease(digest)
        both.release(digest)
    for number in range(50):
        both.popularity.used(f"once{number}")
        both.popularity.loaded(f"once{number}", 10, 0.01)
        assert both.install(adapter(f"once{number}", 10)), "a row waits for it"
    assert all(digest in both for digest in hot)


def test_the_host_tier_keeps_what_is_worth_most() -> None:
    one = tiers(device=10, host=20)
    for digest, uses in (("much", 9), ("more", 5), ("little", 1), ("some", 3)):
        one.popularity.used(digest, uses)
        one.popularity.loaded(digest, 10, 0.01)
        one.keep(adapter(digest, 10))
    assert {held.digest for held in one.held()} == {"much", "more"}


def test_changes_that_are_too_many_to_remember_are_told_as_everything() -> None:
    one = tiers(device=20, host=0)
    for number in range(5000):
        assert one.install(adapter(f"a{number}", 10))
    change = one.changes(1)
    assert change.complete and change.added == {"a4998", "a4999"}
    recent = one.changes(change.revision - 2)
    assert not recent.complete and len(recent.added | recent.removed) == 2
    assert one.changes(change.revision + 1).complete, "a revision of somebody else's log"


def test_pins_have_a_share() -> None:
    one = tiers(device=100)
    for digest in ("a", "b", "c"):
        assert one.install(adapter(digest, 30)) and one.lease(digest)
    one.pin("a")
    one.pin("b")
    with pytest.raises(InvalidRequest, match="hold 60 of the 80 bytes"):
        one.pin("c")


def test_what_is_offered_in_vain_is_no_news() -> None:
    """A load that waits for room offers its adapter again and again; who reads the news must not drown."""
    one = tiers(device=10, host=0)
    assert one.install(adapter("a", 10)) and one.lease("a")
    before = one.changes(0).revision
    for _ in range(10):
        assert not one.install(adapter("b", 10))
        one.keep(adapter("b", 10))
    assert one.changes(0).revision == before
    one.check_integrity()


def test_who_keeps_up_with_the_news_costs_no_list_of_all_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tiers()
    assert one.install(adapter("a", 10))
    before = one.changes(0).revision
    monkeypatch.setattr(one.host, "digests", pytest.fail)
    assert one.install(adapter("b", 10))
    assert one.changes(before).added == {"b"}


class FullTransfer(Transfer):
    """A device, or a host, whose memory others have taken: ``up`` and ``down`` fail."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.up = self.down = False
        self.moved_down: list[str] = []

    def to_device(self, adapter: ResidentAdapter) -> ResidentAdapter:
        if self.up:
            raise torch.OutOfMemoryError("the device is full")
        return super().to_device(adapter)

    def to_host(self, adapter: ResidentAdapter) -> ResidentAdapter:
        if self.down:
            raise RuntimeError("no pinned memory")
        self.moved_down.append(adapter.digest)
        return super().to_host(adapter)


def test_memory_that_others_took_leaves_the_books_right() -> None:
    transfer = FullTransfer()
    both = Tiers(20, 20, transfer, EngineMetrics(), clock=lambda: 0.0)
    for digest in ("a", "b"):
        assert both.install(adapter(digest, 10))
    transfer.down, before = True, both.changes(0).revision
    assert both.install(adapter("c", 10)), "who needs the room gets it"
    assert "a" not in both and both.changes(before).removed == {"a"}
    both.check_integrity()
    transfer.down, transfer.up = False, True
    both.keep(adapter("d", 10))
    before = both.changes(0).revision
    with pytest.raises(torch.OutOfMemoryError):
        both.lease("d")
    assert "d" not in both and both.changes(before).removed == {"d"}
    both.check_integrity()
    transfer.up = False
    assert both.install(adapter("d", 10)) and both.lease("d")
    both.check_integrity()


def test_only_what_is_kept_is_copied_to_host_memory() -> None:
    transfer = FullTransfer()
    one = Tiers(10, 0, transfer, EngineMetrics(), clock=lambda: 0.0)
    for digest in ("a", "b", "c"):
        assert one.install(adapter(digest, 10))
    assert transfer.moved_down == []


def test_clearing_frees_all_but_what_is_in_use_until_it_is_not() -> None:
    both = tiers(device=20, host=20)
    for digest in ("a", "b"):
        assert both.install(adapter(digest, 10)) and both.lease(digest)
    both.keep(adapter("c", 10))
    both.release("b")
    both.drop("a")
    both.clear()
    both.check_integrity()
    assert [held.digest for held in both.held()] == ["a"] and both.lease("a") is None
    both.release("a")
    both.check_integrity()
    assert both.held() == [] and both.capacity().device_used == 0
