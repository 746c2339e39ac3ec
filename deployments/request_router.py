"""The only place that touches Ray Serve's alpha and private routing surface (2.60).

Our dispatcher decides where a shard goes; this router obeys: a call whose ``session_id`` names a replica goes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from adapter_router.routing.replica_state import Member
from deployments import replica_view


class PinnedRequestRouter(RequestRouter):  # type: ignore[misc]  # Ray ships no usable types
    """To the replica that ``session_id`` names while it lives; any other call to the least loaded one."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: object) -> None:
        super().on_replica_actor_died(replica_id)
        self._publish()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranked groups; within a group Serve takes the least loaded."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else the retry loop spins while all are full
        pinned = [r for r in candidate_replicas if r.replica_id.unique_id == pending_request.metadata.session_id]
        return [pinned or candidate_replicas]

    async def _choose_replica_for_request(
        self,
        pending_request: PendingRequest,
        *,
        is_retry: bool = False,  # noqa: ARG002
    ) -> RunningReplica:
        """Decide in the caller's coroutine.

        Serve's own routing tasks match pending requests by an id that all calls made for one outer request share; a
        router without FIFOMixin then never answers the second of two concurrent calls.
        """
        attempt = 0
        while True:
            while not self._replicas:
                self._replicas_updated_event.clear()
                await self._replicas_updated_event.wait()
            for group in await self.choose_replicas(self._replicas_list, pending_request):
                chosen = await self._select_from_candidate_replicas(group, attempt)
                if chosen is not None:
                    return chosen
            await self._backoff(attempt)
            attempt += 1

    def _publish(self) -> None:
        members = _members({id.unique_id: replica.replica_metadata for id, replica in self._replicas.items()})
        replica_view.publish(self._deployment_id.app_name, self._deployment_id.name, members)


def _members(metadata: Mapping[str, Mapping[str, Any]]) -> tuple[Member, ...]:
    """Replicas as their ``record_replica_metadata`` describes them.

    Serve asks for that once, and renumbers ranks when it scales down: of two that give the same home one has its name
    for a home instead, the same one wherever this is decided.
    """
    members: dict[str, Member] = {}
    for name in sorted(metadata):
        home = metadata[name].get("home", name)
        home = name if home in members else home
        members[home] = Member(name, home, metadata[name].get("weight", 1.0))
    return tuple(members.values())
