"""Loops whose number of turns the data decide, under a name that says how many there can be.

A compiled program does not tell how often such a loop runs, and who counts its operations (``rlrag.hlo``) would know of
one turn. The program does know a bound, from its shapes. It is written where it survives compilation and changes
nothing: into the name of the loop, which profiles show, too.

A loop whose turns are counted by themselves (the steps of a burst, the chunks of a prefill, the micro-batches of a
batch) stays a plain ``lax`` loop.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax

State = TypeVar("State")

SCOPE = "most_turns="  # followed by the number, as rlrag.hlo reads it


def fori_loop(
    lower: jax.Array | int, upper: jax.Array | int, body: Callable[[jax.Array, State], State], initial: State, most: int
) -> State:
    """``lax.fori_loop``, of at most so many turns."""
    with jax.named_scope(f"{SCOPE}{most}"):
        return lax.fori_loop(lower, upper, body, initial)
