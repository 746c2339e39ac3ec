"""Whether an adapter's tensors and its configuration cover each other, and fit the base."""
