"""Benchmarks: speed against other programs, and memory. Only the command `bench` imports this."""
