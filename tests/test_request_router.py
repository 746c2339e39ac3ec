"""What the dispatcher hears of Serve's replicas."""

from __future__ import annotations

from adapter_router.routing.replica_state import Member
from deployments.request_router import _members


def test_no_two_replicas_share_a_home() -> None:
    """Serve renumbers ranks when it scales down and asks for metadata once: a newcomer may get a rank that is told."""
    told = {"c": {"home": "rank-1", "weight": 8}, "a": {"home": "rank-0", "weight": 8}, "b": {"home": "rank-1"}}
    members = _members(told)
    assert set(members) == {Member("a", "rank-0", 8), Member("b", "rank-1"), Member("c", "c", 8)}
    assert members == _members(dict(reversed(told.items()))), "whatever order Serve has them in"
    assert _members({"x": {}}) == (Member("x", "x"),)
