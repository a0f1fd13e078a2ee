"""What models and adapters are written as: what a target is (target), each target, their tables (table); cards (card)."""
