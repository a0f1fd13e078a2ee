"""Files that a model is written to: what every target is (target), each in a file of its own (pth), and their table."""
