"""Benchmarks: one question a file, ratios against a peer or the limit in the same run."""
