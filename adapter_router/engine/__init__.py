"""The engine room: mixed batches on one base model, without Ray."""

from adapter_router.engine.engine import Engine

__all__ = ["Engine"]
