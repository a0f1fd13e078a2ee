"""What models and adapters are written as: a target (target), each of them, their tables (table); cards (card)."""
