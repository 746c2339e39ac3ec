"""Adapters that are broken or mean harm: each is refused by name, at once, and leaves no trace."""
