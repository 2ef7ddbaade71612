"""A fit that trains nothing, for every test of this folder."""

from __future__ import annotations

import pytest
from fake_fit import FakeFit


@pytest.fixture
def fit() -> FakeFit:
    return FakeFit()
