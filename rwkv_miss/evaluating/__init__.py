"""How good a model is on data: its loss per token, its answers, and how far it is from its base."""
