"""What a model is written as: what a target is (target), each target (pth), their table (table); its card (card)."""
