import jax
import jax.numpy as jnp

from kernels import loops


def test_a_bounded_loop_is_the_loop_and_says_its_bound():
    def times(x, n):
        return loops.fori_loop(1, n, lambda i, y: y * i, x, 9)

    compiled = jax.jit(times).lower(jnp.float32(1), jnp.int32(5)).compile()
    assert compiled(jnp.float32(1), jnp.int32(5)) == 24
    assert f"{loops.SCOPE}9/while" in compiled.as_text()
