"""What is read out of compiled programs, against what can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels import loops
from rlrag.hlo import Cost, Instruction, axes_of, groups_of, num_bytes, read, sent_bytes
from rlrag.mesh import make_mesh

ALONE = {"data": 1, "model": 1}


def compiled(function, *shapes):
    return read(jax.jit(function).lower(*shapes).compile().as_text(), ALONE)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_a_loop_counts_as_often_as_it_runs():
    def deep(x, weights):
        return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, weights)[0]

    found = compiled(deep, shape(32, 64), shape(7, 64, 64))
    assert found.loops == ()
    assert found.once.flops == 7 * 2 * 32 * 64 * 64
    assert found.once.traffic == 7 * 4 * (32 * 64 + 64 * 64 + 32 * 64)


def test_a_loop_that_the_data_end_is_told_apart():
    def some(x, w, times):
        x = jax.lax.fori_loop(0, times, lambda _, y: jnp.tanh(y @ w), x)
        return jnp.einsum("bd,cd->bc", x, x)

    found = compiled(some, shape(32, 64), shape(64, 64), shape(dtype=jnp.int32))
    assert found.once.flops == 2 * 32 * 32 * 64
    assert [loop.flops for loop in found.loops] == [2 * 32 * 64 * 64]


def test_a_loop_of_at_most_so_many_turns_counts_all_of_them():
    """In and around others, and in a backward pass of their own: 3 layers of at most 7, and of at most 5 of 2."""

    @jax.custom_vjp
    def some(x, w, times):
        return loops.fori_loop(0, times, lambda _, y: jnp.tanh(y @ w), x, 7)

    def backward(residuals, gradient):
        w, times = residuals
        both = lambda _, y: loops.fori_loop(0, times, lambda _, z: jnp.tanh(z @ w.T), y, 2)  # noqa: E731
        return loops.fori_loop(0, times, both, gradient, 5), None, None

    some.defvjp(lambda x, w, times: (some(x, w, times), (w, times)), backward)

    def loss(x, w, times):
        layer = jax.checkpoint(lambda x, _: (jnp.sin(some(x, w, times)), None))
        return jax.lax.scan(layer, x, None, length=3)[0].sum()

    found = compiled(jax.value_and_grad(loss), shape(32, 64), shape(64, 64), shape(dtype=jnp.int32))
    assert found.loops == ()
    assert found.once.flops == 3 * (2 * 7 + 5 * 2) * 2 * 32 * 64 * 64  # forward, and again before backward


def test_the_bound_of_a_mapped_loop_is_read():
    def some(x, w, times):
        return jax.vmap(lambda y: loops.fori_loop(0, times, lambda _, z: jnp.tanh(w @ z), y, 7))(x)

    found = compiled(some, shape(32, 64), shape(64, 64), shape(dtype=jnp.int32))
    assert (found.loops, found.once.flops) == ((), 7 * 2 * 32 * 64 * 64)


def test_of_branches_the_most_expensive_counts():
    def one(x, w, choice):
        return jax.lax.cond(choice, lambda: jnp.tanh(x @ w) @ w, lambda: jnp.tanh(x @ w))

    found = compiled(one, shape(32, 64), shape(64, 64), shape(dtype=jnp.bool_))
    assert found.once.flops == 2 * 2 * 32 * 64 * 64


def gather_in_a_loop():
    """Rows over data, a product that is summed over model, in a scan of five."""
    mesh = make_mesh(4, 2)

    def put(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def step(x, pair):
        up, down = pair
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ up) @ down, put("data", None)), None

    program = jax.jit(lambda x, up, down: jax.lax.scan(step, x, (up, down))[0], out_shardings=put("data", None))
    arguments = [
        jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=put("data", None)),
        jax.ShapeDtypeStruct((5, 32, 48), jnp.float32, sharding=put(None, "data", "model")),
        jax.ShapeDtypeStruct((5, 48, 32), jnp.float32, sharding=put(None, "model", "data")),
    ]
    with jax.set_mesh(mesh):
        found = read(program.lower(*arguments).compile().as_text(), mesh.shape).once
    print(found.flops, found.sent.get(("all-gather", ("data",))), found.sent.get(("all-reduce", ("model",))))


def test_devices_tell_each_other_what_fsdp_and_the_model_axis_need(run_on_devices):
    flops, gathered, summed = run_on_devices(gather_in_a_loop, 8).split()
    assert float(flops) == 5 * 2 * (2 * 16 * 32 * 24)  # 16 of 64 rows, half of the width
    assert float(gathered) == 5 * 2 * (4 * 32 * 24) * 3 / 4
    assert float(summed) == 5 * 2 * (4 * 16 * 32) / 2


def groups(text: str) -> np.ndarray:
    return groups_of(Instruction("it", "f32[]", "all-reduce", (), text))


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x={}", ("model",)),
        ("replica_groups=[4,2]<=[8], use", ("model",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), use", ("data",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, d", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}, d", ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(4)2}, dimensions={0}", ("model",)),
        ("replica_groups=mesh['a'=8] {'a':(1)4}, dimensions={0}", ("data",)),
        ("replica_groups=mesh['a'=8] {'a'}, dimensions={0}", ("data", "model")),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, x", ("model",)),
    ],
)
def test_groups_in_every_spelling(text, axes):
    assert axes_of(groups(text), {"data": 4, "model": 2}) == axes


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="the groups of it are spelled in an unknown way: replica_groups=odd"):
        groups("replica_groups=odd")


def test_groups_of_a_part_of_an_axis():
    assert groups("replica_groups=mesh['a'=8] {'a':(2)2}, d").tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_bytes():
    assert num_bytes("(f32[2,3]{1,0}, bf16[4], pred[5], s4[6], f32[])") == 24 + 8 + 5 + 3 + 4
    assert sent_bytes("all-gather", 800, 8) == 700
    assert sent_bytes("all-reduce", 800, 8) == 1400
    assert sent_bytes("reduce-scatter", 100, 8) == 700
    assert sent_bytes("collective-permute", 100, 2) == 100


def test_costs_add_and_multiply():
    one = Cost(1.0, 2.0, {("all-reduce", ("data",)): 4.0})
    other = Cost(10.0, 20.0, {("all-gather", ("data",)): 5.0})
    assert one + other * 2 - one == Cost(20.0, 40.0, {("all-reduce", ("data",)): 0.0, ("all-gather", ("data",)): 10.0})
