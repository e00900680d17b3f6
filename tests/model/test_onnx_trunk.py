"""What ONNX Runtime's side decides before a graph is run."""

from __future__ import annotations

import pytest

from plaudit_model.contract import Serving
from plaudit_model.errors import ContractError


@pytest.mark.parametrize(("backend", "dtype"), [("torch", "int8"), ("onnx", "bfloat16")])
def test_a_dtype_that_the_backend_has_not_is_refused(backend: str, dtype: str) -> None:
    with pytest.raises(ContractError, match=rf"backend {backend} serves .* not {dtype} .*plaudit model export"):
        Serving(backend, dtype)  # type: ignore[arg-type]
