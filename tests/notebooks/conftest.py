"""The policy of the end-to-end tests."""

from tests.e2e.conftest import small_policy

__all__ = ["small_policy"]
