"""Benchmarks: every op against its floor and its peers."""
