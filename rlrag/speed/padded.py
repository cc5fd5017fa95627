"""Learning from rows as others lay them out and score them: a row for every answer, its prompt repeated, padding to
the longest, dense attention under a mask, the head at every column behind the prompt.

What TRL's GRPOTrainer (its logits_to_keep) and Tunix do; everything else is as in our own update: flat products, the
gradients written out, one program a micro-batch, buffers donated, no second pass for the old policy.
"""

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.log_prob.api import token_stats
from kernels.token_stats import filtered_log_prob
from rlrag.batch import Batch
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import Transformer
from rlrag.model.transformer import trunk
from rlrag.objectives.losses import Scores
from rlrag.speed.update import RowSizes


def sizes(num_streams: int, longest: int, columns: int) -> RowSizes:
    """Micro-batches of about `columns` columns that rows of `longest` tokens fill to the last."""
    able = [rows for rows in range(1, num_streams + 1) if num_streams % rows == 0]
    rows = min(able, key=lambda rows: (abs(rows * longest - columns), rows))
    return RowSizes(rows, longest, max_segments=2)


def score(
    prompt_tokens: int, params: Transformer, a: Architecture, batch: Batch, key: jax.Array | None = None
) -> Scores:
    """As scoring.score, of rows that begin with `prompt_tokens` tokens of a prompt; leaves of batch are [R, ...]."""
    table = batch.segments
    with dispatch.requesting(packed_attention="reference"):
        hidden = trunk(params, a, batch.tokens, batch.positions, batch.segment, table.parent, table.adapters, key)
    ids = jnp.concatenate([batch.tokens[..., None], batch.kept], -1)[:, prompt_tokens:]
    stats = token_stats(
        hidden[:, prompt_tokens - 1 : -1], params.output_head.astype(hidden.dtype), ids,
        temperature=batch.temperature[:, prompt_tokens:], implementation="reference",
    )  # fmt: skip
    logp = filtered_log_prob(stats.logits[..., 0], stats.lse, stats.logits[..., 1:])

    def placed(values: jax.Array) -> jax.Array:
        return jnp.where(batch.act > 0, jnp.pad(values, ((0, 0), (prompt_tokens, 0))), 0.0)

    return Scores(placed(logp), placed(stats.entropy), placed(stats.certainty), jnp.zeros(batch.tokens.shape))
