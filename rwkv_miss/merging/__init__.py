"""Base + adapter as one file."""
