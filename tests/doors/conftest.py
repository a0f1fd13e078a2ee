"""The extension points of the package: each test adds a toy extension as CONTRIBUTING.md describes."""

from tests.training.conftest import base, data

__all__ = ["base", "data"]
