"""The parts of ``benchmarks.cache``: requests, replicas that sleep, and two places for them to run."""
