"""The grouped forward against one row at a time in float64, and what it costs in products and copies."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapter_router.engine.kernels import LoraSegment, Scratch, add_lora
from adapter_router.engine.plan import BatchPlan, sorted_order
from adapter_router.engine.resident import LoraFactors, ResidentAdapter

IN, OUT = 12, 20


def segment(num_rows: int, rank: int) -> LoraSegment:
    return LoraSegment(num_rows, rank, torch.randn(IN, rank), torch.randn(rank, OUT))


def reference(y: torch.Tensor, x: torch.Tensor, segments: list[LoraSegment]) -> torch.Tensor:
    """One row at a time, in float64."""
    rows = [s for s in segments for _ in range(s.num_rows)]
    return torch.stack(
        [
            y[i].double() + x[i].double() @ s.a.double() @ s.b.double() if s.rank else y[i].double()
            for i, s in enumerate(rows)
        ]
    )


@pytest.mark.parametrize("inner", [(), (7,), (3, 5)], ids=["rows", "rows-tokens", "rows-2d"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_equals_the_reference_for_any_mix(inner: tuple[int, ...], dtype: torch.dtype, atol: float) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    scratch = Scratch()
    for _ in range(50):
        sizes = torch.randint(1, 4, (6,), generator=generator).tolist()
        ranks = [[0, 1, 4, 4, 8][i] for i in torch.randint(0, 5, (6,), generator=generator)]
        segments = [segment(n, r) for n, r in zip(sizes, ranks, strict=True)]
        x = torch.randn(sum(sizes), *inner, IN).to(dtype)
        y = torch.randn(sum(sizes), *inner, OUT).to(dtype)
        expected = reference(y, x, segments)
        out = add_lora(y.clone(), x, segments, scratch)
        assert out.dtype == dtype and out.shape == y.shape
        torch.testing.assert_close(out.double(), expected, atol=atol, rtol=1e-6 if dtype == torch.float32 else 2e-2)


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    segments = [segment(2, 8), segment(1, 4)]
    x, y = torch.randn(3, 5, IN).bfloat16(), torch.randn(3, 5, OUT).bfloat16()
    wide = add_lora(y.float(), x.float(), segments, Scratch())
    assert torch.equal(add_lora(y.clone(), x, segments, Scratch()), wide.bfloat16())


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

    def adapter(name: str, rank: int) -> ResidentAdapter:
        factors = LoraFactors(torch.zeros(IN, rank), torch.zeros(rank, OUT))
        return ResidentAdapter(name, {"module": factors}, {}, 2, 0, rank)

    adapters = [adapter(f"a{i}", (4, 8, 16)[i % 3]) for i in range(12)]
    rows: list[ResidentAdapter | None] = [adapters[i % 12] for i in range(30)] + [None, None]
    shuffled = [rows[i] for i in torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    plan = BatchPlan([shuffled[i] for i in sorted_order(shuffled)])
    segments = plan.lora("module")
    assert segments is not None and len(segments) == 13 and plan.lora("other") is None
    shapes = [segment[:2] for segment in segments]
    runs = 1 + sum(a != b for a, b in pairwise(shapes))
    assert runs == len(set(shapes))


def test_every_row_runs_through_one_head() -> None:
    own = torch.nn.Linear(2, 2)
    with_head = ResidentAdapter("with", {}, {"classifier": own}, 2, 0, 0)
    without = ResidentAdapter("without", {}, {}, 2, 0, 0)
    plan = BatchPlan([None, without, without, with_head, with_head])
    groups = plan.heads("classifier")
    assert [(head is own, [(s.start, s.stop) for s in segments]) for head, segments in groups] == [
        (False, [(0, 1), (1, 3)]),
        (True, [(3, 5)]),
    ]
