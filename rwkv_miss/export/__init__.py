"""File formats that a model is written to: what a target is (target), each target (pth), and their table (table)."""
