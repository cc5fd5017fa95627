"""A survey's lines against programs compiled as large as they are, and against what can be calculated by hand."""

from dataclasses import replace

import pytest

from kernels.log_prob import api as log_prob
from rlrag.config import Mesh
from rlrag.dry_run import account, compile_all, lower_rollout, lower_update
from rlrag.hlo import read
from rlrag.model.parameters import num_parameters
from rlrag.plan import open_setting
from rlrag.survey import WIDENING, Compiler, accelerated, as_accelerators, halved, rollout_loops, survey
from tests.experiments import tiny


def experiment(layers: int = 6, dtype: str = "bfloat16", remat: str = "all"):
    found = tiny()
    found.mesh = Mesh(1, 1)
    found.model = replace(
        found.model, num_layers=layers, embed_dim=64, mlp_dim=192, num_heads=4, num_kv_heads=2, head_dim=16,
        dtype=dtype, param_dtype=dtype, remat=remat, vocab_size=512,
    )  # fmt: skip
    found.main.update.row_tokens, found.main.loss.kl = 256, 0.1
    return found


def test_lines_meet_programs_as_large_as_they_are(tmp_path):
    """Five layers extrapolated from two and three; rows and slots from one and two sizes, tried at another. With few
    slots prefill needs most of the round, with many decoding."""
    shape = experiment(layers=5)
    shape.rollout.prefill_rows = 16
    with open_setting(shape, tmp_path) as setting:
        found = survey(setting, native=False)
        many = 10 * found.slots
        large = accelerated(setting).resized(rows=3 * found.rows, slots=many)
        exact, line = account(large), found.account(3 * found.rows, many)
        compiler = Compiler(False, found.mesh)
        with as_accelerators():
            update = compiler.update(large, apply=False)
            same = compiler.compile(lower_rollout(large.resized(slots=found.slots)))
            wide = lower_rollout(large)["advance"].compile(compiler.options)
    assert {**line.stays, "process": exact.stays["process"]} == exact.stays
    assert line.beside == exact.beside
    for name in ("prepare", "accumulate"):
        assert found.needed[name].at(3 * found.rows, 0) == pytest.approx(update[name].needed, rel=0.02), name
    prefill, decode = rollout_loops(same["advance"].counted)
    assert found.costs["prefill"].flops == prefill.flops > 0
    assert found.costs["decode"].flops == decode.flops > 0
    assert found.costs["decode"].traffic == pytest.approx(decode.traffic, rel=1e-6)
    assert found.costs["pack"].traffic == same["pack"].passed
    few, most = ({name: found.needed[name].at(0, n) for name in ("prefill", "decode")} for n in (found.slots, many))
    assert few["prefill"] > few["decode"]
    assert few["prefill"] == pytest.approx(same["advance"].needed, rel=0.1)
    assert most["decode"] > most["prefill"]
    assert most["decode"] == pytest.approx(wide.memory_analysis().temp_size_in_bytes, rel=0.1)
    assert found.passes == 1, "the reference scores; the policy's own numbers are the sampler's"
    assert log_prob.CHUNK_BYTES, "as before the survey"


def test_operations_are_those_of_the_textbook(tmp_path):
    """Kaplan et al. 2020, arXiv 2001.08361, table 1: 2 N a token forward, twice that backward, N without the embedding;
    and attention, whose scores and mixtures are two products forward and four backward over all T x T of a row."""
    with open_setting(experiment(remat=""), tmp_path) as setting:
        a, update = setting.a, setting.stage.settings.update
        compiled, _ = compile_all(lower_update(setting.programs, setting.stage, setting.mesh))
        found = read(compiled["accumulate"].as_text(), {"data": 1, "model": 1}).once.flops
    tokens = update.micro_rows * update.row_tokens
    N = num_parameters(a)  # tied: the table is the head, and looking it up costs nothing
    attention = 3 * 2 * 2 * a.num_layers * a.num_heads * a.head_dim * update.row_tokens * tokens
    assert found == pytest.approx(6 * N * tokens + attention, rel=0.005)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_what_a_layer_adds_to_activations(tmp_path, dtype, width):
    """With remat the backward pass keeps a layer's input [rows * T, D] and its gradients, as wide as its parameters."""
    with open_setting(experiment(dtype=dtype), tmp_path) as setting:
        setting = replace(setting, a=halved(setting.a))
        a, update = setting.a, setting.stage.settings.update
        needed = {}
        for depth in (6, 16):
            deep = setting.resized(layers=depth)
            accumulate = {"accumulate": lower_update(deep.programs, deep.stage, deep.mesh)["accumulate"]}
            compiled, _ = compile_all(accumulate, {"xla_disable_hlo_passes": WIDENING})
            needed[depth] = compiled["accumulate"].memory_analysis().temp_size_in_bytes
        parameters = (num_parameters(replace(a, num_layers=2)) - num_parameters(replace(a, num_layers=1))) * width
    kept = update.micro_rows * update.row_tokens * a.embed_dim * width
    assert (needed[16] - needed[6]) / 10 == pytest.approx(kept + parameters, rel=0.02)


def test_bfloat16_is_as_narrow_as_on_an_accelerator(tmp_path):
    """Whether or not this CPU's compiler widens its products (that of JAX 0.10.2 does)."""

    def needed(dtype: str, native: bool) -> int:
        with open_setting(experiment(layers=2, dtype=dtype), tmp_path) as setting:
            narrow = setting if native else replace(setting, a=halved(setting.a))
            advance = {"advance": lower_rollout(narrow)["advance"]}
            return Compiler(native, {"data": 1, "model": 1}).compile(advance)["advance"].needed

    narrow = needed("bfloat16", native=False)
    assert narrow <= needed("bfloat16", native=True)
    assert narrow < needed("float32", native=True)
