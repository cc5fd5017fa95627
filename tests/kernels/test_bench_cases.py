"""Every implementation that runs here is in the cases of its operation."""

import jax
import pytest

from kernels import bench_cases
from kernels.advantage import api as advantage_api
from kernels.bench_cases import OPERATIONS, cases, sized
from kernels.decode_attention import api as decode_attention_api
from kernels.log_prob import api as log_prob_api
from kernels.uncertainty import api as uncertainty_api

APIS = (log_prob_api, uncertainty_api, advantage_api, decode_attention_api)


@pytest.mark.parametrize(("operation", "api"), list(zip(OPERATIONS, APIS)), ids=OPERATIONS)
def test_new_entries_appear_by_themselves(operation, api, monkeypatch):
    here = {name for name, entry in api.IMPLEMENTATIONS.items() if "cpu" in entry.platforms}
    monkeypatch.setitem(api.IMPLEMENTATIONS, "new", api.IMPLEMENTATIONS["reference"])
    found = list(cases("quick", "cpu", (operation,)))
    assert found
    for case in found:
        assert case.operation.split()[0] == operation
        assert {*here, "new"} <= set(case.functions)
        assert case.against in case.functions and case.baseline in case.functions
        assert case.flops or case.moved_bytes
        for name, function in case.functions.items():
            assert jax.eval_shape(function, *case.arguments) is not None, name


def test_full_sizes_are_those_of_the_models():
    of = sized("full")
    assert {head.tokens for head in of.heads} == {4096, 16_384, 32_768}
    assert {spec.slots for spec in of.attention} == {128}


def test_the_issue_s_sizes():
    assert [(head.tokens, head.vocabulary) for head in sized("issue").heads] == [(4096, 32_768), (4096, 151_936)]
    (recurrence,) = sized("issue").recurrences
    assert (recurrence.rows, recurrence.tokens) == (64, 4096)


def test_a_module_that_is_not_there_is_none():
    assert bench_cases.optional("kernels.log_prob.nothing") is None
    assert bench_cases.optional("kernels.log_prob.chunked") is not None
