"""File formats that a model is written to: what a target is (target), each target, and their tables (table)."""
