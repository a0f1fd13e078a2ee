"""The doors that new things come in by: each test adds a toy in the way that CONTRIBUTING.md says."""

from tests.training.conftest import base, data

__all__ = ["base", "data"]
