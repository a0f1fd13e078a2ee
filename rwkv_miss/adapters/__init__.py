"""Adapters: the method (miss), where it goes (inject), and its files (files)."""
