"""The decision itself, for one base at one moment: plain numbers in, a number and its reason out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.autoscaling.knobs import Knobs
from deployments.autoscaling.window import Highest

_STRAIN_MEMORY = 10.0  # times downscale_delay_s


@dataclass(frozen=True)
class Signals:
    """How one base is doing, all routers and replicas together.

    ``target``: replicas that were decided on before; ``running``: those that live. ``complete``: every router has
    reported lately; without that nothing is taken away. ``working_set_bytes``: of adapters asked for again and again.
    ``waiting_tokens``: of rows queued or being computed; ``tokens_s``: that come in a second. ``queued_rows``,
    ``queue_age_s``: of those not sent yet. ``misses_s``: rows a second that were refused or came too late. ``idle_s``:
    seconds since anything was asked, 0 while anything waits. Of the replicas, on the mean: ``capacity_bytes`` for
    adapters (0: not known), the part of the time they were loading, evictions a second.
    """

    target: int
    running: int
    complete: bool = True
    working_set_bytes: float = 0.0
    waiting_tokens: float = 0.0
    tokens_s: float = 0.0
    queued_rows: float = 0.0
    queue_age_s: float = 0.0
    misses_s: float = 0.0
    idle_s: float = 0.0
    capacity_bytes: float = 0.0
    loading_fraction: float = 0.0
    evictions_s: float = 0.0


@dataclass(frozen=True)
class Decision:
    """How many replicas there shall be, and why. ``wanted``: what each rule alone would have."""

    replicas: int
    reason: str
    wanted: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Strain:
    """So many replicas were too few for what was asked then."""

    replicas: int
    working_set_bytes: float
    tokens_s: float
    since: float


class State:
    """What is remembered of one base between decisions."""

    def __init__(self, knobs: Knobs) -> None:
        self.capacity_bytes = 0.0
        self.strain: _Strain | None = None
        self._fewest = Highest(knobs.upscale_delay_s)  # of negated needs: the highest is the smallest need
        self._most = Highest(knobs.downscale_delay_s)
        self._replicas = (0, 0)
        self._changed = -math.inf

    def observe(self, signals: Signals, now: float) -> None:
        """Note what lasts."""
        self.capacity_bytes = signals.capacity_bytes or self.capacity_bytes
        if self._replicas != (signals.target, signals.running):
            self._replicas = (signals.target, signals.running)
            self._changed = now

    def settled(self, seconds: float, now: float) -> bool:
        """Whether all replicas there shall be have been running for so long."""
        target, running = self._replicas
        return running >= target and now - self._changed >= seconds

    def needed_throughout(self, need: int, now: float) -> int:
        """The smallest need of the last ``upscale_delay_s``; 0 while it is not known."""
        highest = self._fewest.tell(-need, now)
        return 0 if highest is None else -int(highest)

    def enough_throughout(self, enough: int, now: float) -> float:
        """What would have been enough at any time of the last ``downscale_delay_s``; infinity while it is not known."""
        highest = self._most.tell(enough, now)
        return math.inf if highest is None else highest


def decide(signals: Signals, knobs: Knobs, state: State, now: float) -> Decision:
    """The replicas that one base shall have from now on; ``now`` in seconds of any clock that does not go back.

    More are decided on when the smallest need of the last ``upscale_delay_s`` is above the target; fewer when the
    largest need of the last ``downscale_delay_s``, with the margin, is below it. What is needed with the margin is
    never less than without, so the two never contradict each other; and a demand that swings by less than
    ``1 - downscale_margin`` of its peak changes nothing.
    """
    state.observe(signals, now)
    wanted = _wanted(signals, knobs, state, now)
    rule = max(wanted, key=wanted.__getitem__)
    lowest = state.needed_throughout(wanted[rule], now)
    highest = state.enough_throughout(_enough(signals, knobs, state, wanted[rule], now), now)
    if signals.target < max(knobs.min_replicas, 1):
        replicas, reason = _from_nothing(signals, knobs, wanted[rule])
    elif lowest > signals.target:
        replicas, reason = lowest, "maximum" if signals.target >= knobs.max_replicas else rule
        if rule not in _DEMANDS:
            state.strain = _Strain(signals.target, signals.working_set_bytes, signals.tokens_s, now)
    else:
        replicas, reason = _fewer(signals, knobs, highest)
    return Decision(min(max(replicas, knobs.min_replicas), knobs.max_replicas), reason, wanted)


def _from_nothing(signals: Signals, knobs: Knobs, need: int) -> tuple[int, str]:
    """Without a replica nothing can wait for a delay: that anything was asked since it went to sleep wakes a base."""
    if signals.target > 0 or knobs.min_replicas > 0:
        return signals.target, "minimum"
    return (0, "asleep") if _is_idle(signals, knobs) else (max(need, 1), "woken")


def _fewer(signals: Signals, knobs: Knobs, highest: float) -> tuple[int, str]:
    """As many as there are, or as few as would have been enough for long enough."""
    if not signals.complete:
        return signals.target, "unreported"
    if knobs.min_replicas == 0 and _is_idle(signals, knobs):
        return 0, "idle"
    if max(highest, knobs.min_replicas, 1) < signals.target:
        return max(int(highest), 1), "spare"
    return signals.target, "steady"


def _is_idle(signals: Signals, knobs: Knobs) -> bool:
    return signals.idle_s > 0 and signals.idle_s >= knobs.downscale_to_zero_delay_s


_DEMANDS = ("working_set", "tokens")


def _wanted(signals: Signals, knobs: Knobs, state: State, now: float) -> dict[str, int]:
    """Replicas by rule: the demand shared out, and one more than there are where they cannot cope."""
    wanted = dict(zip(_DEMANDS, _shares(signals, knobs, state, 1.0), strict=True))
    strained = {
        "misses": signals.misses_s > knobs.max_misses_s,
        "wait": signals.queue_age_s > knobs.max_wait_s,
        "loading": signals.loading_fraction > knobs.max_loading_fraction,
        "evictions": signals.evictions_s > knobs.max_evictions_s,
    }
    may_add = signals.queued_rows > 0 and signals.running > 0 and state.settled(knobs.settle_s, now)
    return wanted | {rule: signals.target + 1 if is_so and may_add else 0 for rule, is_so in strained.items()}


def _enough(signals: Signals, knobs: Knobs, state: State, need: int, now: float) -> int:
    """Replicas that would cope with a margin: never as few as were too few for a demand like this."""
    enough = max(need, *_shares(signals, knobs, state, knobs.downscale_margin))
    if state.strain is not None:
        if _is_like(signals, state.strain, knobs, now):
            return max(enough, state.strain.replicas + 1)
        state.strain = None
    return enough


def _is_like(signals: Signals, strain: _Strain, knobs: Knobs, now: float) -> bool:
    """Whether what is asked now is about what strained the replicas then."""
    if now - strain.since > _STRAIN_MEMORY * knobs.downscale_delay_s:
        return False
    pairs = (signals.working_set_bytes, strain.working_set_bytes), (signals.tokens_s, strain.tokens_s)
    return not any(then > 0 and asked <= knobs.downscale_margin * then for asked, then in pairs)


def _shares(signals: Signals, knobs: Knobs, state: State, margin: float) -> tuple[int, int]:
    """Replicas for the working set and for the tokens, when each gives ``margin`` of what it can."""
    room = max(1.0, state.capacity_bytes * knobs.memory_fill * margin)
    by_memory = signals.working_set_bytes / room if state.capacity_bytes > 0 else 0.0
    by_tokens = signals.waiting_tokens / (knobs.target_tokens_per_replica * margin)
    return math.ceil(by_memory - 1e-9), math.ceil(by_tokens - 1e-9)
