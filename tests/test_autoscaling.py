"""How many replicas a base gets: the decision alone, on traces under a virtual clock and on what hypothesis finds."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private.autoscaling_state import AutoscalingStateManager
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from adapter_router.routing.pressure import RouterLoad
from adapter_router.types import ReplicaLoad
from deployments.app import AutoscalingArgs
from deployments.autoscaling import POLICY, for_replicas, for_routers, replica_report, router_report
from deployments.autoscaling.decision import Decision, Signals, State, decide
from deployments.autoscaling.knobs import Knobs
from deployments.autoscaling.window import Highest

_MB = 1 << 20
_TICK_S = 0.5
KNOBS = Knobs(
    max_replicas=8,
    memory_fill=1.0,
    target_tokens_per_replica=1000,
    upscale_delay_s=2.0,
    downscale_delay_s=30.0,
    downscale_to_zero_delay_s=60.0,
    settle_s=5.0,
)
CALM = Signals(target=1, running=1, capacity_bytes=4 * _MB, working_set_bytes=3 * _MB, idle_s=1.0)


@dataclass(frozen=True)
class Step:
    """A moment of a simulated base."""

    now: float
    decision: Decision
    running: int


def simulate(
    asked: Callable[[float, int], dict[str, float]],
    seconds: float,
    knobs: Knobs = KNOBS,
    replicas: int = 1,
    start_s: float = 3.0,
) -> list[Step]:
    """Decisions every half second. ``asked(now, running)`` gives signals; a replica takes ``start_s`` to start."""
    state = State(knobs)
    target, living, steps = replicas, replicas, []
    starting: list[float] = []
    for tick in range(int(seconds / _TICK_S)):
        now = tick * _TICK_S
        living += sum(at <= now for at in starting)
        starting = [at for at in starting if at > now]
        fields = {"capacity_bytes": 4.0 * _MB if living else 0.0, "idle_s": 1.0, **asked(now, living)}
        decision = decide(Signals(target=target, running=living, **fields), knobs, state, now)
        if decision.replicas > target:
            starting += [now + start_s] * (decision.replicas - target)
        elif decision.replicas < target:
            starting = starting[: max(0, decision.replicas - living)]
            living = min(living, decision.replicas)
        target = decision.replicas
        steps.append(Step(now, decision, living))
    return steps


def changes(steps: list[Step], first: int = 1) -> list[tuple[float, int, str]]:
    """When the number of replicas changed, to what, and why."""
    found, before = [], first
    for step in steps:
        if step.decision.replicas != before:
            before = step.decision.replicas
            found.append((step.now, before, step.decision.reason))
    return found


def hot(adapters: float) -> dict[str, float]:
    """A working set of adapters of 1 MB each; a replica holds four."""
    return {"working_set_bytes": adapters * _MB}


# -- traces ------------------------------------------------------------------------------------------------------


def test_a_step_from_3_to_14_hot_adapters_takes_1_to_4_replicas_and_back_after_the_cool_down() -> None:
    steps = simulate(lambda now, _: hot(14 if 10 <= now < 60 else 3), 150)
    (up, most, why), (down, least, back) = changes(steps)
    assert (most, why) == (4, "working_set") and 12.0 <= up <= 13.0
    # 3 of them need 3 / (4 * 0.65) = 1.2: with the margin, one replica is not enough to go back to.
    assert (least, back) == (2, "spare") and 90.0 <= down <= 91.0


def test_with_room_to_spare_the_last_one_is_enough_again() -> None:
    steps = simulate(lambda now, _: hot(14 if 10 <= now < 60 else 2), 150)
    assert [replicas for _, replicas, _ in changes(steps)] == [4, 1]


@pytest.mark.parametrize("period_s", [7, 45, 300, 3000])
@pytest.mark.parametrize("mean", [5, 6.5, 9, 10.2, 13.3, 17, 23])
def test_a_sine_of_20_percent_never_makes_it_flap(period_s: float, mean: float) -> None:
    def sine(now: float, _: int) -> dict[str, float]:
        level = 1 + 0.2 * math.sin(2 * math.pi * now / period_s)
        return {
            **hot(mean * level),
            "waiting_tokens": mean * 250 * level,
            "tokens_s": 100 * level,
            "queued_rows": 1.0,
        }

    turns = [replicas for _, replicas, _ in changes(simulate(sine, 3 * period_s + 200))]
    assert turns == sorted(turns), "it went down, only to come up again"
    # Peaks that are shorter than upscale_delay_s are not seen in full.
    assert math.ceil(mean / 4) <= turns[-1] <= math.ceil(mean * 1.2 / 4)
    assert period_s < 40 or turns[-1] == math.ceil(mean * 1.19 / 4)


def test_the_same_sine_flaps_without_the_margin() -> None:
    naive = replace(KNOBS, downscale_margin=1.0)
    steps = simulate(lambda now, _: hot(10.2 * (1 + 0.2 * math.sin(2 * math.pi * now / 300))), 1000, naive)
    turns = [replicas for _, replicas, _ in changes(steps)]
    assert turns != sorted(turns)


def test_a_burst_shorter_than_the_delay_changes_nothing_and_a_longer_one_does() -> None:
    def burst(length_s: float) -> list[tuple[float, int, str]]:
        return changes(simulate(lambda now, _: {"waiting_tokens": 5000.0 if 10 <= now < 10 + length_s else 100.0}, 90))

    assert burst(1.5) == []
    (up, most, why), (_, least, _) = burst(5)
    assert (up, most, why, least) == (12.0, 5, "tokens", 1)


def test_a_dip_that_ends_before_the_cool_down_takes_nothing_away() -> None:
    steps = simulate(lambda now, _: hot(2 if 20 <= now < 45 or 50 <= now < 75 else 14), 100)
    assert [replicas for _, replicas, _ in changes(steps)] == [4]


def test_fewer_replicas_are_those_that_would_have_been_enough_all_along() -> None:
    def uneven(now: float, _: int) -> dict[str, float]:
        return hot(20 if now < 10 else 7 if now % 20 < 1 else 1)

    assert [replicas for _, replicas, _ in changes(simulate(uneven, 120))] == [5, 3]


def test_a_scan_grows_the_base_only_while_rows_queue_and_one_by_one() -> None:
    """Each adapter is asked for once, so the working set stays small; loads take all of the time."""

    def scan(now: float, running: int) -> dict[str, float]:
        load = {"loading_fraction": 0.9, "evictions_s": 5.0, "tokens_s": 100.0}
        return {**hot(1), **load, "queued_rows": 20.0 if now >= 30 and running < 3 else 0.0}

    found = changes(simulate(scan, 100))
    assert [replicas for _, replicas, _ in found] == [2, 3]
    assert {why for *_, why in found} <= {"loading", "evictions"}
    assert found[0][0] >= 30, "nothing waited before"
    assert found[1][0] - found[0][0] >= 3 + KNOBS.settle_s, "the second must see what the first has changed"


def test_replicas_that_were_too_few_are_not_tried_again_at_once_for_the_same_demand() -> None:
    def slow(now: float, running: int) -> dict[str, float]:
        late = {"misses_s": 1.0, "queued_rows": 5.0} if running < 3 else {}
        return {**hot(2 if now < 200 else 0.5), "tokens_s": 100.0 if now < 200 else 20.0, **late}

    calm = replace(KNOBS, max_replicas=3)
    assert [replicas for _, replicas, _ in changes(simulate(slow, 200, calm))] == [2, 3]
    # ... until much less is asked: 30 s later they go.
    quiet = [(now, n) for now, n, _ in changes(simulate(slow, 240, calm)) if now > 100]
    assert quiet[0][0] == pytest.approx(230, abs=1) and quiet[0][1] < 3


def test_strain_is_forgotten_some_time() -> None:
    def once(now: float, _: int) -> dict[str, float]:
        return {**hot(2), "tokens_s": 100.0, **({"misses_s": 1.0, "queued_rows": 5.0} if now < 8 else {})}

    found = changes(simulate(once, 400))
    assert [replicas for _, replicas, _ in found] == [2, 1]
    assert found[1][0] - found[0][0] > 300


def test_to_zero_when_nothing_was_asked_and_back_at_once() -> None:
    knobs = replace(KNOBS, min_replicas=0)
    last, wakes = 20.0, 200.0

    def rarely(now: float, running: int) -> dict[str, float]:
        waits = now >= wakes
        return {
            **hot(3 if now < last else 0),
            "idle_s": 0.0 if now < last or waits else now - last,
            "queued_rows": 1.0 if waits and not running else 0.0,
        }

    assert changes(simulate(rarely, 220, knobs)) == [(80.0, 0, "idle"), (200.0, 1, "woken")]


def test_what_came_between_two_reports_wakes_a_base_too() -> None:
    sleepy = replace(KNOBS, min_replicas=0)
    asleep = Signals(target=0, running=0, idle_s=0.4)
    assert decide(asleep, sleepy, State(sleepy), 0.0).replicas == 1
    assert decide(replace(asleep, idle_s=60.0), sleepy, State(sleepy), 0.0).replicas == 0


def test_with_a_minimum_of_one_it_never_goes_to_zero() -> None:
    assert changes(simulate(lambda now, _: {"idle_s": now}, 400)) == []


# -- moments -----------------------------------------------------------------------------------------------------


def at_once(signals: Signals, **knobs: float) -> Decision:
    """A decision without any delay."""
    eager = replace(KNOBS, upscale_delay_s=0, downscale_delay_s=0, settle_s=0, **knobs)
    return decide(signals, eager, State(eager), 0.0)


@pytest.mark.parametrize(
    ("rule", "signals"),
    [
        ("working_set", {"working_set_bytes": 5.0 * _MB}),
        ("tokens", {"waiting_tokens": 1001.0}),
        ("misses", {"misses_s": 0.2}),
        ("wait", {"queue_age_s": 1.1}),
        ("loading", {"loading_fraction": 0.6}),
        ("evictions", {"evictions_s": 1.1}),
    ],
)
def test_each_rule_adds_a_replica_and_is_the_reason(rule: str, signals: dict[str, float]) -> None:
    strained = replace(CALM, queued_rows=1.0, **signals)
    assert at_once(strained) == Decision(
        2, rule, {**dict.fromkeys(at_once(CALM).wanted, 0), "working_set": 1} | {rule: 2}
    )
    if rule not in ("working_set", "tokens"):
        assert at_once(replace(strained, queued_rows=0.0)).replicas == 1, "nobody waits"
        assert at_once(replace(strained, target=2)).replicas == 2, "another one is starting"


def test_nothing_is_taken_away_while_a_router_is_not_heard() -> None:
    spare = replace(CALM, target=4, running=4)
    assert at_once(spare).replicas == 2
    assert at_once(replace(spare, complete=False)) == replace(at_once(spare), replicas=4, reason="unreported")
    deaf = replace(CALM, target=1, idle_s=math.inf, complete=False)
    assert at_once(deaf, min_replicas=0).replicas == 1


@pytest.mark.parametrize("min_replicas", [0, 1])
def test_nothing_to_do_is_no_reason_for_a_change(min_replicas: int) -> None:
    idle = at_once(replace(CALM, working_set_bytes=0.0), min_replicas=min_replicas)
    assert (idle.replicas, idle.reason, set(idle.wanted.values())) == (1, "steady", {0})


def test_at_the_maximum_the_reason_says_so() -> None:
    full = at_once(replace(CALM, target=8, running=8, working_set_bytes=40.0 * _MB))
    assert (full.replicas, full.reason, full.wanted["working_set"]) == (8, "maximum", 10)


def test_capacity_is_remembered_while_no_replica_says_it() -> None:
    state = State(KNOBS)
    decide(replace(CALM, target=2, running=2), KNOBS, state, 0.0)
    asleep = Signals(target=0, running=0, working_set_bytes=14.0 * _MB, idle_s=0.0)
    assert decide(asleep, replace(KNOBS, min_replicas=0), state, 1.0).replicas == 4


def test_knobs_say_all_that_is_wrong_with_them() -> None:
    with pytest.raises(ValueError) as refused:
        Knobs(max_replicas=1, min_replicas=2, downscale_margin=1.5, memory_fill=0, settle_s=float("nan"))
    for name in ("min_replicas", "downscale_margin", "memory_fill", "settle_s"):
        assert name in str(refused.value)


def test_the_document_and_the_arguments_know_every_knob_and_its_default() -> None:
    text = (Path(__file__).parent.parent / "docs" / "autoscaling.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.MULTILINE)
    documented = {name: None if default == "–" else float(default) for name, default in rows}  # noqa: RUF001
    knobs = {field.name: None if field.default is MISSING else field.default for field in fields(Knobs)}
    arguments = {name: field.get_default() for name, field in AutoscalingArgs.model_fields.items()}
    arguments["max_replicas"] = None
    assert documented == knobs == arguments


# -- anything ----------------------------------------------------------------------------------------------------

_amounts = st.floats(0, 1e12, allow_nan=False)
_signals = st.builds(
    Signals,
    target=st.integers(0, 12),
    running=st.integers(0, 12),
    complete=st.booleans(),
    working_set_bytes=_amounts,
    waiting_tokens=_amounts,
    tokens_s=_amounts,
    queued_rows=_amounts,
    queue_age_s=_amounts,
    misses_s=_amounts,
    idle_s=_amounts | st.just(math.inf),
    capacity_bytes=_amounts,
    loading_fraction=st.floats(0, 1),
    evictions_s=_amounts,
)
_knobs = st.builds(
    Knobs,
    max_replicas=st.integers(4, 10),
    min_replicas=st.integers(0, 4),
    target_tokens_per_replica=st.integers(1, 10**9),
    downscale_margin=st.floats(0.05, 1),
    memory_fill=st.floats(0.05, 1),
    upscale_delay_s=st.floats(0, 20),
    downscale_delay_s=st.floats(0, 20),
    settle_s=st.floats(0, 20),
)


@settings(deadline=None)
@given(_knobs, st.lists(st.tuples(st.floats(0, 30), _signals), min_size=1, max_size=30))
def test_decisions_keep_the_limits_whatever_is_reported(knobs: Knobs, moments: list[tuple[float, Signals]]) -> None:
    state, now = State(knobs), 0.0
    for seconds, signals in moments:
        now += seconds
        made = decide(signals, knobs, state, now)
        assert knobs.min_replicas <= made.replicas <= knobs.max_replicas
        bounded = min(max(signals.target, knobs.min_replicas), knobs.max_replicas)
        if made.replicas < bounded:
            assert signals.complete, "taken away by somebody who does not know"
            assert made.replicas > 0 or signals.idle_s >= knobs.downscale_to_zero_delay_s
        if made.replicas > bounded:
            assert made.replicas <= max(*made.wanted.values(), 1)


@settings(deadline=None)
@given(_knobs, _signals, st.integers(1, 30))
def test_what_does_not_change_comes_to_rest(knobs: Knobs, signals: Signals, seconds: int) -> None:
    """Of a demand that stays as it is there is at most one change up and one down; it does not oscillate."""
    steady = replace(signals, queued_rows=0.0, complete=True)
    state, target, turns = State(knobs), signals.target, []
    for tick in range(60):
        made = decide(replace(steady, target=target, running=target), knobs, state, float(tick * seconds))
        turns += [made.replicas - target] if made.replicas != target else []
        target = made.replicas
    assert len(turns) <= 2 and not (len(turns) == 2 and turns[0] < 0 < turns[1])


@settings(deadline=None)
@given(st.floats(0, 10), st.lists(st.tuples(st.floats(0.01, 5), st.integers(0, 9)), min_size=1, max_size=60))
def test_the_window_knows_the_highest_value_of_its_seconds(length_s: float, told: list[tuple[float, int]]) -> None:
    window, now, history = Highest(length_s), 0.0, list[tuple[float, int]]()
    for seconds, value in told:
        now += seconds
        history.append((now, value))
        ends = [at for at, _ in history[1:]] + [now]
        held = [v for (_, v), end in zip(history, ends, strict=True) if end > now - length_s] or [value]
        assert window.tell(value, now) == (max(held) if now - history[0][0] >= length_s else None)


# -- the policy in Serve's hands -----------------------------------------------------------------------------------


class Controller:
    """Serve's own state of one application with two routers and a base, fed with reports; no cluster."""

    def __init__(self, knobs: Knobs, policy: str | None = POLICY, clock: float = 0.0) -> None:
        self.now = clock
        self.replicas = DeploymentID("replica", "app")
        self.routers = DeploymentID("router", "app")
        self.targets = {self.replicas: 1, self.routers: 2}
        self.state = AutoscalingStateManager()
        if policy is not None:
            self.state.register_application("app", AutoscalingPolicy(policy_function=policy))
            app_state = self.state._app_autoscaling_states["app"]
            app_state._policy.__wrapped__._clock = lambda: self.now
        for key, config in ((self.replicas, for_replicas(knobs)), (self.routers, for_routers(2, 1.0))):
            # By way of the message in which the controller gets it.
            sent = DeploymentConfig(autoscaling_config=AutoscalingConfig(**config)).to_proto_bytes()
            info = DeploymentInfo(DeploymentConfig.from_proto_bytes(sent), ReplicaConfig.create(dict), 0, "job")
            self.state.register_deployment(key, info, self.targets[key])

    def run(self, count: int = 1) -> None:
        """So many replicas, and both routers, live."""
        for key, living in ((self.replicas, count), (self.routers, 2)):
            self.state.update_running_replica_ids(key, [ReplicaID(f"{key.name}-{n}", key) for n in range(living)])

    def report(self, key: DeploymentID, number: int, numbers: Mapping[str, float]) -> None:
        """What a replica pushes."""
        self.now += 0.001
        series = {name: [TimeStampedValue(self.now, value)] for name, value in numbers.items()}
        replica = ReplicaID(f"{key.name}-{number}", key)
        self.state.record_request_metrics_for_replica(ReplicaMetricReport(replica, series, self.now))

    def decide(self) -> int:
        """One turn of the control loop."""
        self.targets.update(self.state.get_decision_num_replicas("app", self.targets))
        assert self.targets[self.routers] == 2
        return self.targets[self.replicas]

    def report_all(self, first: RouterLoad, second: RouterLoad, replicas: int = 1) -> None:
        self.report(self.routers, 0, router_report({"replica": first}))
        self.report(self.routers, 1, router_report({"replica": second}))
        for number in range(replicas):
            self.report(self.replicas, number, replica_report(ReplicaLoad(capacity_bytes=4 * _MB)))


_EAGER = replace(KNOBS, upscale_delay_s=0, downscale_delay_s=10)


def test_serve_applies_a_decision_at_once_and_as_it_is() -> None:
    controller = Controller(_EAGER)
    controller.run()
    assert controller.decide() == 1, "nothing has been reported yet"
    controller.report_all(RouterLoad(working_set_bytes=9 * _MB, open_tokens=10), RouterLoad(working_set_bytes=14 * _MB))
    assert controller.decide() == 4, "of the working sets the largest, each router sees a part of one stream"
    controller.run(4)
    controller.report_all(RouterLoad(open_tokens=2600), RouterLoad(open_tokens=2500), 4)
    assert controller.decide() == 6, "queues add up"
    controller.run(6)
    controller.report_all(RouterLoad(), RouterLoad(), 6)
    controller.decide()
    controller.now += 9.0
    controller.report_all(RouterLoad(), RouterLoad(), 6)
    assert controller.decide() == 6
    controller.now += 1.5
    assert controller.decide() == 1


def test_serve_goes_to_zero_and_back_without_a_delay_of_its_own() -> None:
    controller = Controller(replace(_EAGER, min_replicas=0, downscale_to_zero_delay_s=5))
    controller.run()
    controller.report_all(RouterLoad(idle_s=4), RouterLoad(idle_s=6))
    assert controller.decide() == 1
    controller.report_all(RouterLoad(idle_s=5), RouterLoad(idle_s=7))
    assert controller.decide() == 0
    controller.run(0)
    assert controller.decide() == 0
    controller.report_all(RouterLoad(idle_s=6), RouterLoad(queued_rows=1, open_tokens=5), 0)
    assert controller.decide() == 1


def test_a_router_that_falls_silent_keeps_what_there_is() -> None:
    controller = Controller(replace(_EAGER, downscale_delay_s=15))
    controller.run()
    controller.report_all(RouterLoad(working_set_bytes=14 * _MB), RouterLoad())
    assert controller.decide() == 4
    controller.run(4)
    controller.report_all(RouterLoad(), RouterLoad())
    for _ in range(20):
        controller.now += 2.0
        controller.report(controller.routers, 1, router_report({"replica": RouterLoad()}))
        assert controller.decide() == 4
    controller.report(controller.routers, 0, router_report({"replica": RouterLoad()}))
    assert controller.decide() == 1


def test_without_a_policy_of_the_application_nothing_changes_but_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("ray.serve"), "error", said.append)
    controller = Controller(_EAGER, policy=None)
    controller.run()
    controller.report_all(RouterLoad(working_set_bytes=14 * _MB), RouterLoad())
    assert controller.decide() == controller.decide() == 1
    (message,) = said
    assert f"lacks autoscaling_policy {{policy_function: {POLICY}}}" in message


def test_the_policy_travels_without_our_code() -> None:
    """Serve's controller gets it by value, as ``ray.serve.config.AutoscalingPolicy`` pickles it."""
    pickled = AutoscalingPolicy(policy_function=POLICY).get_serialized_policy_def()
    script = (
        "import pickle, sys\n"
        "sys.modules['deployments'] = sys.modules['adapter_router'] = None\n"
        "policy = pickle.loads(sys.stdin.buffer.read())\n"
        "print(policy()({}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, input=pickled, capture_output=True)
    assert done.stdout.decode().strip() == "({}, {})", done.stderr.decode()
