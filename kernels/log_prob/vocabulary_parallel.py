"""token_stats on a mesh: each device computes its own tokens against its own part of the vocabulary, with any
implementation, a kernel that the compiler could not partition among them.

Tokens are cut over some mesh axes by rows, the head [V, D] over another by vocabulary. Each device runs the
implementation on what it holds as if there were nothing else, and only numbers of tokens cross devices:

- forward: lse, entropy and certainty of a part of the vocabulary give back its sums (``token_stats.sums_of``), which
  ``token_stats.combine_devices`` merges over the vocabulary axis: five numbers a token, and its wanted logits.
- backward: of dz = (g_lse + g_c - g_H (log p + H)) p - g_c / V a part with V / m entries, told lse and H of the whole,
  needs g_c / m in the last term and g_lse + g_c unchanged in the first; d hidden is summed over the vocabulary axis,
  d head over the axes of the tokens, each once.

The shard_maps run forwards only, one in each half of the custom_vjp around them: nothing is ever differentiated
through a shard_map (with check_vma=False that would scale gradients by the size of an axis). Left to the compiler, as
it is without ``Shards``, the same sums cross devices, but the gradient of the head once a chunk.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from kernels import token_stats as monoid
from kernels.token_stats import TokenStats

Array = jax.Array


class Shards(NamedTuple):
    """How a call lies on a mesh; hashable. A dimension that its axes do not divide stays whole on every device."""

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]  # the mesh axes that cut B
    vocabulary: str | None  # the mesh axis that cuts V

    def fitted(self, rows: int, vocabulary: int) -> "Shards":
        """Without axes of one device, and without those that do not divide these sizes."""
        sizes = self.mesh.shape
        over = tuple(axis for axis in self.rows if sizes[axis] > 1)
        fits = rows % math.prod(sizes[axis] for axis in over) == 0
        cuts = self.vocabulary is not None and sizes[self.vocabulary] > 1 and vocabulary % sizes[self.vocabulary] == 0
        return self._replace(rows=over if fits else (), vocabulary=self.vocabulary if cuts else None)

    def local(self, rows: int, vocabulary: int) -> tuple[int, int]:
        """Of B and V what one device holds."""
        parts = self.fitted(rows, vocabulary)
        rows //= math.prod(self.mesh.shape[axis] for axis in parts.rows)
        return rows, vocabulary // (self.mesh.shape[parts.vocabulary] if parts.vocabulary else 1)


def statistics(
    run: Callable[..., TokenStats], shards: Shards, hidden: Array, head: Array, ids: Array, scale: Array | None,
    count: Array | None,
) -> TokenStats:  # fmt: skip
    """``run`` with the same arguments on each device, merged; arguments as in ``reference.forward``, and the count of
    columns that are wanted, of all devices."""
    parts = shards.fitted(hidden.shape[0], head.shape[0])
    axis, vocabulary = parts.vocabulary, head.shape[0]

    def local(hidden: Array, head: Array, ids: Array, scale: Array | None, count: Array | None) -> TokenStats:
        if axis is None:
            return run(hidden, head, ids, scale, count)
        stats = run(hidden, head, ids - lax.axis_index(axis) * head.shape[0], scale, count)
        flat = jax.tree.map(lambda each: each.reshape(ids.shape[0] * ids.shape[1], *each.shape[2:]), stats)
        sums = monoid.combine_devices(monoid.sums_of(flat, head.shape[0]), axis)
        merged = monoid.finish(sums._replace(count=jnp.full_like(sums.count, vocabulary)))
        return jax.tree.map(lambda each, like: each.reshape(like.shape), merged, stats)

    rows, columns, everywhere = PartitionSpec(parts.rows), PartitionSpec(axis), PartitionSpec()
    mapped = jax.shard_map(
        local, mesh=shards.mesh, in_specs=(rows, columns, rows, rows, everywhere), out_specs=rows, check_vma=False
    )
    return mapped(hidden, head, ids, scale, count)


def gradients(
    run: Callable[..., tuple[Array, Array]],
    shards: Shards,
    hidden: Array,
    head: Array,
    ids: Array,
    scale: Array | None,
    count: Array | None,
    lse: Array,
    entropy: Array,
    cotangent: TokenStats,
) -> tuple[Array, Array]:
    """``run`` with the same arguments on each device, summed; arguments as in ``reference.backward``."""
    parts = shards.fitted(hidden.shape[0], head.shape[0])
    axis = parts.vocabulary

    def local(
        hidden: Array, head: Array, ids: Array, scale: Array | None, count: Array | None, lse: Array, entropy: Array,
        cotangent: TokenStats,
    ) -> tuple[Array, Array]:  # fmt: skip
        if axis is not None:
            ids = ids - lax.axis_index(axis) * head.shape[0]
            certainty = cotangent.certainty / shards.mesh.shape[axis]
            cotangent = cotangent._replace(lse=cotangent.lse + cotangent.certainty - certainty, certainty=certainty)
        grad_hidden, grad_head = run(hidden, head, ids, scale, count, lse, entropy, cotangent)
        if axis is not None:
            flat = grad_hidden.reshape(-1, hidden.shape[-1])
            grad_hidden = lax.psum(flat, axis).reshape(hidden.shape)
        return grad_hidden, lax.psum(grad_head, parts.rows) if parts.rows else grad_head

    rows, columns, everywhere = PartitionSpec(parts.rows), PartitionSpec(axis), PartitionSpec()
    mapped = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(rows, columns, rows, rows, everywhere, *[rows] * 3),
        out_specs=(rows, columns),
        check_vma=False,
    )
    return mapped(hidden, head, ids, scale, count, lse, entropy, cotangent)
