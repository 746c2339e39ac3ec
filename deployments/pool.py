"""The replicas of one base model, as one router sees them: who lives, how they are called, what runs where."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Collection, Sequence
from typing import Any

from ray import exceptions
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from adapter_router.catalog.records import AdapterSpec
from adapter_router.catalog.store import StoredAdapter
from adapter_router.config import RoutingConfig
from adapter_router.errors import AdapterRouterError, AdapterUnavailable, ReplicaLost
from adapter_router.metrics import RouterMetrics
from adapter_router.routing.dispatcher import Dispatcher
from adapter_router.routing.replica_state import Member
from adapter_router.types import AdapterVersion, BaseInfo, LoadReport, Row, ShardReply
from deployments import replica_view

logger = logging.getLogger(__name__)

_LOST = (exceptions.RayActorError, exceptions.NodeDiedError, ReplicaUnavailableError)
_BY_VALUE_BYTES = 1 << 20  # Serve's by-value path is the faster one, and refuses messages of 4 MiB
_CHECKS = 16  # of new adapters at once: a replica takes a bounded number of calls, and rows shall find room
_HOME_S = 60.0  # for a replica that checks an adapter to live
_ANSWER_S = 10.0  # for an answer from memory: who needs longer is stuck, and shall not stop whoever asks all
_LOAD_S = 90.0  # for one that may have to load first: more than the engine's own patience
_LOADS = ("pin", "warm")


class Pool:
    """One base's replicas and the dispatcher in front of them."""

    def __init__(
        self, replicas: DeploymentHandle, base: BaseInfo, routing: RoutingConfig, metrics: RouterMetrics
    ) -> None:
        self.base = base
        self.dispatcher = Dispatcher(self, routing, metrics, max_tokens=base.max_tokens)
        self._replicas = replicas
        self._checks = asyncio.Semaphore(_CHECKS)

    @classmethod
    async def of(cls, replicas: DeploymentHandle, routing: RoutingConfig, metrics: RouterMetrics) -> Pool:
        """Waits for a replica: the base is what it says it serves."""
        return cls(replicas, await replicas.info.remote(), routing, metrics)

    @property
    def deployment(self) -> str:
        """The name of the replicas' deployment."""
        return str(self._replicas.deployment_name)

    def living(self) -> tuple[str, ...]:
        """The living replicas."""
        return tuple(member.replica for member in self.members())

    async def call(self, replica: str, method: str, *args: Any, by_reference: bool = False) -> Any:
        """Call one replica. Raises ReplicaLost when it is gone."""
        handle = self._replicas.options(method_name=method, session_id=replica, _by_reference=by_reference)
        response = handle.remote(*args)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # Serve does not by itself
            raise
        except _LOST as error:
            raise ReplicaLost(f"replica {replica} was lost; try again") from error

    async def ask_all(self, method: str, *args: Any, among: Collection[str] | None = None) -> dict[str, Any]:
        """What every living replica of ``among`` answers; one that is lost on the way, fails or hangs is left out."""
        answers: dict[str, Any] = {}

        async def ask(replica: str) -> None:
            try:
                async with asyncio.timeout(_LOAD_S if method in _LOADS else _ANSWER_S):
                    answers[replica] = await self.call(replica, method, *args)  # an error that is returned is an answer
            except Exception as error:
                logger.warning("replica %s does not answer %s: %r", replica, method, error)

        await asyncio.gather(*(ask(replica) for replica in self.living() if among is None or replica in among))
        return answers

    async def check(self, spec: AdapterSpec, stored: StoredAdapter, resident: bool) -> LoadReport:
        """Check a stored adapter on the replica that will be its home; a lost one's place is taken once.

        Raises AdapterRejected with every problem, AdapterUnavailable when no replica lives.
        """
        async with self._checks:
            try:
                return await self._check(spec, stored, resident)
            except ReplicaLost:
                return await self._check(spec, stored, resident)

    async def _check(self, spec: AdapterSpec, stored: StoredAdapter, resident: bool) -> LoadReport:
        try:
            async with asyncio.timeout(_HOME_S):
                replica = await self.dispatcher.home(stored.digest)
        except TimeoutError as error:
            raise AdapterUnavailable(f"no replica of base {self.base.name} lives just now; try again later") from error
        report: LoadReport | AdapterRouterError = await self.call(replica, "admit", spec, stored, resident)
        if isinstance(report, AdapterRouterError):
            raise report
        if resident:
            self.dispatcher.fleet.loaded(replica, stored.digest)
        return report

    def members(self) -> tuple[Member, ...]:
        """The living replicas, as routing sees them."""
        return replica_view.members(self._replicas.app_name, self._replicas.deployment_name)

    async def warm(self, replica: str, version: AdapterVersion) -> None:
        """Have one replica load an adapter. Raises why it cannot."""
        error: AdapterRouterError | None = await self.call(replica, "warm", version)
        if error is not None:
            raise error

    async def send(
        self, replica: str, rows: Sequence[Row], versions: Sequence[AdapterVersion | None], known: int
    ) -> ShardReply:
        """One call of one replica, whose residency is known up to ``known``. Raises ReplicaLost when it is gone."""
        by_reference = len(pickle.dumps((rows, versions))) > _BY_VALUE_BYTES
        reply: ShardReply = await self.call(replica, "infer", rows, versions, known, by_reference=by_reference)
        return reply
