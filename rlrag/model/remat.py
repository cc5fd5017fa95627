"""What the backward pass keeps of a layer, and what it computes again (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Callable

import jax

# Name in the architecture -> which intermediate values are kept; None: none but the layer's input.
POLICIES: dict[str, Callable[..., bool] | None] = {
    "all": None,
    # Of what is large the cheap is computed again: norms, rotations, activations, attention's weights.
    "elementwise": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialized(step: Callable, remat: str) -> Callable:
    """The body of a scan over layers, with what its architecture says of recomputation; empty: everything is kept."""
    if not remat:
        return step
    assert remat in POLICIES, f"{remat} is not settled yet"
    # A scan keeps forward and backward apart by itself.
    return jax.checkpoint(step, policy=POLICIES[remat], prevent_cse=False)
