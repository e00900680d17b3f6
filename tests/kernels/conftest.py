"""Where there is no GPU, the Triton kernels run in Triton's interpreter, which must be on before triton is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.exit("triton was imported before tests/kernels could switch its interpreter on: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def torch_operations(kernels: Callable[[str], None]) -> None:
    """No fused kernels."""
    kernels("torch")
