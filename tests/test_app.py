"""What the arguments of an application come to."""

from __future__ import annotations

from deployments.app import AppArgs, catalog_of


def test_no_larger_file_is_fetched_than_the_largest_device_has_room_for() -> None:
    more = [{"base": "b", "adapter_memory_bytes": 5000}]
    args = AppArgs.model_validate({"base": "a", "adapter_memory_bytes": 1000, "more_bases": more})
    assert catalog_of(args).max_adapter_bytes == 4 * 5000  # float64 on disk, half precision on the device
