"""What is trained: the methods (method), MiSS (miss), learned states (state) and the base's own parameters (whole);
what a method trains of a model (plan), putting it into the model (inject), and adapter folders (files)."""
