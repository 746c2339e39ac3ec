"""Which rows run together, and where. Pure asyncio: no torch, no Ray."""
