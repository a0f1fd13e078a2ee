"""How much memory a run takes, from its settings and the shapes of its base alone: nothing is loaded or computed."""
