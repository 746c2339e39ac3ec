"""The grouped forward against one row at a time in float64, and what it costs in products and copies."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapter_router.engine.kernels import LoraSegment, Scratch, add_lora
from adapter_router.engine.layers import GroupedModule
from adapter_router.engine.plan import ActivePlan, BatchPlan, PlanRow, sorted_order
from adapter_router.engine.probe import RowArguments
from adapter_router.engine.resident import DeviceDelta, ResidentAdapter

IN, OUT = 12, 20


def segment(num_rows: int, rank: int, scaling: float = 1.0) -> LoraSegment:
    return LoraSegment(num_rows, rank, scaling, torch.randn(IN, rank), torch.randn(rank, OUT))


def adapter_of(name: str, rank: int = 0, **parts: Any) -> ResidentAdapter:
    parts = {"deltas": {}, "heads": {}, "num_labels": 2, "num_bytes": 0, "max_rank": rank, **parts}
    return ResidentAdapter(name, "text-classification", **parts)


def plan_row(adapter: ResidentAdapter | None) -> PlanRow:
    return PlanRow(adapter, "text-classification")


def reference(y: torch.Tensor, x: torch.Tensor, segments: list[LoraSegment]) -> torch.Tensor:
    """One row at a time, in float64."""
    rows = [s for s in segments for _ in range(s.num_rows)]
    return torch.stack(
        [
            y[i].double() + x[i].double() @ s.a.double() @ s.b.double() * s.scaling if s.rank else y[i].double()
            for i, s in enumerate(rows)
        ]
    )


@pytest.mark.parametrize("inner", [(), (7,), (3, 5)], ids=["rows", "rows-tokens", "rows-2d"])
def test_equals_the_reference_for_any_mix(inner: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    scratch = Scratch()
    for _ in range(50):
        sizes = torch.randint(1, 4, (6,), generator=generator).tolist()
        ranks = [[0, 1, 4, 4, 8][i] for i in torch.randint(0, 5, (6,), generator=generator)]
        scalings = [[1.0, 1.0, 0.3][i] for i in torch.randint(0, 3, (6,), generator=generator)]
        segments = [segment(n, r, s) for n, r, s in zip(sizes, ranks, scalings, strict=True)]
        x, y = torch.randn(sum(sizes), *inner, IN), torch.randn(sum(sizes), *inner, OUT)
        expected = reference(y, x, segments)
        add_lora(y, x, segments, scratch)
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """The module's own output, in its dtype, plus LoRA in float32: one rounding, as PEFT does for one adapter."""
    torch.manual_seed(0)
    linear, active = torch.nn.Linear(IN, OUT, dtype=dtype), ActivePlan()
    adapters = []
    for name, rank in (("one", 8), ("two", 4)):
        delta = DeviceDelta(rank, 0.7, torch.randn(IN, rank), torch.randn(rank, OUT))
        adapters.append(adapter_of(name, rank, deltas={"linear": delta}))
    x = torch.randn(3, 5, IN).to(dtype)
    base = linear(x)
    rows = [adapters[0], adapters[0], adapters[1]]
    expected = [
        (base[i].float() + (x[i].float() @ d.a @ d.b) * 0.7).to(dtype)
        for i, d in enumerate(row.deltas["linear"] for row in rows)
    ]
    GroupedModule(linear, "linear", active, RowArguments(frozenset({0}), frozenset()))
    with active.running(BatchPlan([plan_row(adapter) for adapter in rows])):
        assert torch.equal(linear(x), torch.stack(expected))


class CountOps(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_adapters", [1, 8, 64])
def test_equal_segments_cost_two_products_however_many(num_adapters: int) -> None:
    segments = [segment(1, 8) for _ in range(num_adapters)]
    x, y = torch.randn(num_adapters, 5, IN), torch.randn(num_adapters, 5, OUT)
    with CountOps() as count:
        add_lora(y, x, segments, Scratch())
    products = {name: n for name, n in count.ops.items() if "mm" in name}
    assert products == {"aten::bmm": 1, "aten::baddbmm_": 1}


def test_plan_puts_equal_segments_side_by_side() -> None:
    """32 rows of 12 adapters of 3 ranks, shuffled: as few runs as (rank, number of rows) pairs."""

    ranks = [(4, 8, 16)[i % 3] for i in range(12)]
    deltas = [DeviceDelta(rank, 1.0, torch.zeros(IN, rank), torch.zeros(rank, OUT)) for rank in ranks]
    adapters = [adapter_of(f"a{i}", ranks[i], deltas={"module": deltas[i]}) for i in range(12)]
    rows: list[ResidentAdapter | None] = [adapters[i % 12] for i in range(30)] + [None, None]
    shuffled = [rows[i] for i in torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    plan_rows = [plan_row(adapter) for adapter in shuffled]
    plan = BatchPlan([plan_rows[i] for i in sorted_order(plan_rows)])
    found = plan.deltas("module")
    assert found is not None and len(found) == 13 and plan.deltas("other") is None
    shapes = [(s.stop - s.start, d.rank if d else 0) for s, d in zip(plan.segments, found, strict=True)]
    runs = 1 + sum(a != b for a, b in pairwise(shapes))
    assert runs == len(set(shapes))


def test_every_row_runs_through_one_head() -> None:
    own = torch.nn.Linear(2, 2)
    with_head, without = adapter_of("with", heads={"classifier": own}), adapter_of("without")
    plan = BatchPlan([plan_row(a) for a in (None, without, without, with_head, with_head)])
    assert plan.groups("pooler") is None
    groups = plan.groups("classifier")
    assert [(head is own, [(s.start, s.stop) for s in segments]) for head, segments in groups or []] == [
        (False, [(0, 1), (1, 3)]),
        (True, [(3, 5)]),
    ]
