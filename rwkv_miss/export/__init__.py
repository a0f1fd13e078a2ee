"""What a model or an adapter is written as: what a target is (target), each target, the tables (table), cards (card)."""
