"""What is trained: what a method is and the table of them all (method), each in a file of its own; what a method trains
of a model (plan), putting it into the model (inject), and adapter folders (files)."""
