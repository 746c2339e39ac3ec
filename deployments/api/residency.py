"""What replicas hold, and how much more they can: ``GET /v1/adapters?view=residency`` and ``GET /v1/capacity``."""

from __future__ import annotations

import time
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends

from adapter_router.catalog.records import Total
from adapter_router.types import Capacity, HeldAdapter
from deployments.adapters import Adapters
from deployments.api.pages import PageQuery, page
from deployments.pool import Pool
from deployments.router import Router, current_router

routes = APIRouter()


async def held(adapters: Adapters, query: PageQuery) -> dict[str, Any]:
    """What is in the replicas' memory; ``after`` is an entry's ``id``."""
    asked_at = time.time()
    entries = sorted(
        (f"{replica}/{held.tier}/{held.digest}", replica, pool, held)
        for replica, (pool, answer) in (await adapters.ask_replicas("residency")).items()
        for held in cast(list[HeldAdapter], answer)
    )
    found = [entry for entry in entries if query.after is None or entry[0] > query.after][: query.limit + 1]
    names = await adapters.registrar.read(adapters.catalog.numbers, {held.digest for *_, held in found})
    data = [
        {
            "id": id_,
            "replica": replica,
            "base": pool.base.name,
            "tier": held.tier,
            "version": held.digest,
            "adapters": sorted({name for name, _ in names.get(held.digest, ())}),
            "versions": [f"{name}@v{number}" for name, number in names.get(held.digest, ())],
            "num_bytes": held.num_bytes,
            "pinned": held.pinned,
            "leases": held.leases,
            "idle_s": held.idle_s,
            "last_used": asked_at - held.idle_s,
        }
        for id_, replica, pool, held in found
    ]
    return page(data, query.limit, "id")


@routes.get("/v1/capacity")
async def capacity(router: Annotated[Router, Depends(current_router)]) -> dict[str, Any]:
    """Of every base and each of its replicas: memory, and how many of the registered adapters fit into it."""
    adapters = router.adapters
    totals = await adapters.registrar.read(adapters.catalog.totals)
    replicas = await adapters.ask_replicas("capacity")
    return {
        "object": "list",
        "registered": await adapters.registrar.read(adapters.catalog.num_registered),
        "data": [
            _of_base(
                pool,
                totals.get(pool.base.fingerprint, Total(0, 0, 0)),
                {name: cast(Capacity, answer) for name, (of, answer) in replicas.items() if of is pool},
            )
            for pool in router.bases
        ],
    }


def _of_base(pool: Pool, total: Total, replicas: dict[str, Capacity]) -> dict[str, Any]:
    """``fits``: adapters of the mean size, of all unretired versions for this base, that the devices can hold at once.

    ``fits_everywhere``: that each of them can. Neither is more than there are.
    """
    mean = total.num_bytes / total.versions if total.versions else 0.0
    fits = {name: _fitting(capacity.device_bytes, total, mean) for name, capacity in sorted(replicas.items())}
    room = min(total.adapters, sum(fits.values()))
    return {
        "base": pool.base.name,
        "base_fingerprint": pool.base.fingerprint,
        "adapters": total.adapters,
        "versions": total.versions,
        "num_bytes": total.num_bytes,
        "mean_num_bytes": mean,
        "fits": room,
        "fits_everywhere": min(fits.values(), default=0),
        "summary": f"fits {room} of your {total.adapters} registered adapters",
        "replicas": [
            {
                "replica": name,
                "device_bytes": replicas[name].device_bytes,
                "device_used": replicas[name].device_used,
                "host_bytes": replicas[name].host_bytes,
                "host_used": replicas[name].host_used,
                "pinned_bytes": replicas[name].pinned,
                "fits": fit,
            }
            for name, fit in fits.items()
        ],
    }


def _fitting(device_bytes: int, total: Total, mean: float) -> int:
    """How many adapters of the mean size one device holds."""
    if total.num_bytes <= device_bytes:
        return total.adapters
    return min(total.adapters, int(device_bytes // mean))
