"""What is trained: adapters (miss), the base's own parameters (full); where they go (inject), and files (files)."""
