"""What tests of the model share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quiet(quiet_torch: None) -> None:
    """Every test here runs on one thread."""
