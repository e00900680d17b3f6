"""What ONNX Runtime's side decides before a graph is run."""

from __future__ import annotations

import pytest

from plaudit_model.contract import Serving
from plaudit_model.errors import ContractError


def test_a_dtype_that_the_backend_has_not_is_refused() -> None:
    with pytest.raises(ContractError, match="backend onnx serves float32 or int8, not fp8; the model that was"):
        Serving("onnx", "fp8")
