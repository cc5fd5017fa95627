"""A forward-only function of whole rows on a mesh: every device runs it on its own rows and heads.

XLA cannot cut loops over rows, or kernels, by itself. Both halves of a ``custom_vjp`` go through here, so that nothing
is ever differentiated through ``shard_map(check_vma=False)``.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from kernels.packed_attention.visibility import Visibility


def by_rows(run: Callable, arguments: tuple, rows: tuple[str, ...], heads: tuple[str, ...]):
    """run(*arguments), whose arrays are [B, T, heads, ...] and whose visibilities [B, T]; results likewise."""
    if not rows and not heads:
        return run(*arguments)

    def spec(argument) -> PartitionSpec | Visibility:
        if isinstance(argument, Visibility):
            window = None if argument.window is None else PartitionSpec()
            return Visibility(*[PartitionSpec(rows)] * 3, window)  # type: ignore[arg-type]  # specs in its tree
        return PartitionSpec(rows, None, heads)

    out = jax.tree.map(lambda _: PartitionSpec(rows, None, heads), jax.eval_shape(run, *arguments))
    specs = tuple(map(spec, arguments))
    return jax.shard_map(run, in_specs=specs, out_specs=out, check_vma=False)(*arguments)
