from __future__ import annotations

import numpy as np
import pytest
import torch

from plaudit_model.packing import Group
from plaudit_server.faults import VARIABLE, Fault, read


def group(prefix: list[int], *suffixes: list[int]) -> Group:
    ids = [np.array(part, np.int32) for part in (prefix, *suffixes)]
    return Group(ids[0], tuple(ids[1:]), tuple(range(len(suffixes))), (0,) * len(suffixes))


def test_without_the_variable_there_is_no_fault() -> None:
    assert read({}) == read({VARIABLE: ""}) == ()


def test_faults_are_a_list() -> None:
    assert read({VARIABLE: "exit_on_token:1,nan_on_token:20"}) == (Fault("exit_on_token", 1), Fault("nan_on_token", 20))


@pytest.mark.parametrize("text", ["exit_on_token", "exit_on_token:", "exit_on_token:x", "explode:1", "nan_on_token:1,"])
def test_a_fault_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=VARIABLE):
        read({VARIABLE: text})


def test_it_strikes_only_where_its_token_is() -> None:
    fault = Fault("raise_on_token", 9)
    fault.before([group([1, 2], [3], [4])])
    with pytest.raises(RuntimeError, match="token 9"):
        fault.before([group([1, 2], [3], [4]), group([9], [1])])


def test_memory_runs_out_over_more_tokens_than_it_says() -> None:
    fault = Fault("oom_over_tokens", 4)
    fault.before([group([1, 2], [3], [4])])
    with pytest.raises(torch.OutOfMemoryError):
        fault.before([group([1, 2], [3], [4]), group([9], [1])])


def test_nan_comes_for_the_items_that_hold_the_token() -> None:
    fault = Fault("nan_on_token", 9)
    groups = [group([1], [9], [2]), group([9], [1], [1])]
    fault.before(groups)
    struck = np.isnan(fault.after(groups, np.ones((4, 2), np.float32)))
    assert struck.tolist() == [[True, True], [False, False], [True, True], [True, True]]
