"""The choice of an implementation: by platform and shape, by name, its errors and its one log line."""

import logging

import jax
import jax.numpy as jnp
import pytest

from kernels import dispatch
from kernels.dispatch import Choice, Implementation


def too_long(limit):
    return lambda *, tokens: f"{tokens} tokens are more than {limit}" if tokens > limit else None


TABLE = {
    "accelerated": Implementation(lambda x: x + 100, platforms=("cuda",)),
    "short": Implementation(lambda x: x + 1, refuses=too_long(8)),
    "elsewhere": Implementation(lambda x: x + 10, automatic=("tpu",)),
    "plain": Implementation(lambda x: x + 2),
}


def run(choice, x):
    return jax.jit(lambda x: dispatch.call(TABLE, choice, lambda function: function, x))(x)


def test_automatic_choice_follows_order_platform_and_shape():
    assert dispatch.choose("op", TABLE, None, tokens=8) == Choice("short", (("cuda", "accelerated"),))
    long = dispatch.choose("op", TABLE, None, tokens=9)
    assert long == Choice("plain", (("cuda", "accelerated"), ("tpu", "elsewhere")))


def test_call_runs_the_implementation_of_the_platform_it_is_lowered_for():
    choice = dispatch.choose("op", TABLE, None, tokens=9)
    assert run(choice, jnp.float32(0)) == 2
    text = jax.jit(lambda x: dispatch.call(TABLE, choice, lambda function: function, x)).trace(0.0)
    assert "1.000000e+02" in text.lower(lowering_platforms=("cuda",)).as_text()
    assert "1.000000e+01" in text.lower(lowering_platforms=("tpu",)).as_text()


def test_requested_name_runs_even_where_it_is_not_automatic():
    assert run(dispatch.choose("op", TABLE, "elsewhere", tokens=8), jnp.float32(0)) == 10


def test_names_may_be_asked_for_from_afar():
    with dispatch.requesting(op="plain", other="x"), dispatch.requesting(other="y"):
        assert dispatch.choose("op", TABLE, None, tokens=8) == Choice("plain")
        assert dispatch.choose("op", TABLE, "elsewhere", tokens=8) == Choice("elsewhere")
        with pytest.raises(ValueError, match="other has no implementation 'y'"):
            dispatch.choose("other", TABLE, None, tokens=8)
    assert dispatch.choose("op", TABLE, None, tokens=8).default == "short"


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("fast", "op has no implementation 'fast'; there are accelerated, short, elsewhere, plain"),
        ("accelerated", "op 'accelerated' runs on cuda, not on cpu; here: short, elsewhere, plain"),
        ("short", "op 'short' does not support this call: 9 tokens are more than 8"),
    ],
)
def test_a_request_that_cannot_run_is_an_error_and_never_replaced(requested, message):
    with pytest.raises(ValueError, match=message):
        dispatch.choose("op", TABLE, requested, tokens=9)


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="op has no implementation for cpu"):
        dispatch.choose("op", {"short": TABLE["short"]}, None, tokens=9)


def test_each_choice_is_logged_once_and_reported(caplog):
    with caplog.at_level(logging.INFO, logger="kernels"):
        for _ in range(3):
            dispatch.choose("logged", TABLE, None, tokens=1)
        dispatch.choose("logged", TABLE, "plain", tokens=1)
    assert caplog.messages == ["logged: short on cpu (automatic)", "logged: plain on cpu (requested)"]
    assert dispatch.chosen()["logged"] == "plain"
