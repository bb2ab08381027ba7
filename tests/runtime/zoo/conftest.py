"""What every cage of the zoo needs: virtual GPUs free again after each test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def free_virtual_gpus() -> Iterator[None]:
    yield
    gc.collect()
