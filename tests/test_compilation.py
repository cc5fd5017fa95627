"""What eight devices compile, tell each other and compute: each program once, no silent collective, the steps of one.

One process with eight virtual devices plays a rollout and takes three optimizer steps on two meshes, with a different
number of micro-batches in each, and writes down what it saw.
"""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from rlrag.agents.workflow import Role
from rlrag.mesh import local_mesh, make_mesh
from rlrag.model.decoding import build_pack
from rlrag.model.parameters import initialize, shardings
from rlrag.objectives.credit import group_relative
from rlrag.objectives.losses import surrogate
from rlrag.objectives.update import build_prepare
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine, Play
from rlrag.trajectory import Example
from tests.episodes import make_groups, pack_groups, pay
from tests.objectives import learner
from tests.rollout import rehearsal

# data, model, replica, of eight devices (tests/pod.py has fewer). Collectives are written out below for those LISTED.
LISTED = {"8x1": (8, 1, 1), "4x2": (4, 2, 1)}
# `make pod` plays these as well, the first of which has fewer kv heads than parts.
MORE = {"2x4": (2, 4, 1), "2x2x2": (2, 2, 2)}
MESHES = LISTED | MORE if os.environ.get("RLRAG_ALL_MESHES") else LISTED
GROUPS = make_groups(8, 8, 4)
ROWS, TOKENS = 8, 96
OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


def collectives(text: str) -> dict[str, int]:
    """Operation and shapes -> how often it stands in a compiled program; one that joins several counts for each."""
    counts: dict[str, int] = {}
    for line in text.splitlines():
        found = re.search(rf"= (.+?) ({'|'.join(OPERATIONS)})(-start)?\(", line)
        if found:
            for shape in re.findall(r"\w+\[[\d,]*\]", found[1]):
                counts[f"{found[2]} {shape}"] = counts.get(f"{found[2]} {shape}", 0) + 1
    return counts


class Talks(Exception):
    """A program that must not has collectives."""


class Watched:
    """A jitted function, and the collectives of what its first call compiles to."""

    def __init__(self, program, silent: bool = False):
        self.program, self.silent, self.collectives = program, silent, None

    def __call__(self, *arguments):
        if self.collectives is None:
            self.collectives = collectives(self.program.lower(*arguments).compile().as_text())
            if self.silent and self.collectives:
                raise Talks
        return self.program(*arguments)

    def report(self) -> dict:
        return {"compiled": self.program._cache_size(), "collectives": self.collectives}


def roll_out(mesh: jax.sharding.Mesh) -> tuple[dict, str]:
    """Two rollouts, the second with other weights and stop strings, from parameters that lie over all devices."""
    a = rehearsal.ARCHITECTURE
    decoder = Decoder(a, rehearsal.SPEC, rehearsal.VOCABULARY, rehearsal.END, local_mesh(mesh))
    # Without a model axis its loops end when a shard's own work does: a collective would wait for the others for ever.
    decoder.advance = advance = Watched(decoder.advance, silent=mesh.shape["model"] == 1)
    engine = Engine({"m": decoder}, rehearsal.decode, rehearsal.SlowSearcher(0.0), max_episodes=24)
    play = Play(rehearsal.talk, {"talker": Role("m"), "chooser": Role("m")}, group_size=2)
    to_decode = build_pack(a, mesh)
    start = jax.jit(lambda key: initialize(a, key), out_shardings=shardings(a, mesh))
    examples = [Example(f"q{i}", "", ("",)) for i in range(8)]
    prints = []
    for key in (0, 1):
        weights = {"m": to_decode(start(jax.random.key(key)))}
        try:
            prints.append(rehearsal.fingerprint(list(engine.run(weights, examples, play, jax.random.key(7)))))
        except Talks:
            break
    engine.close()
    return advance.report(), " ".join(prints)


def learn(mesh: jax.sharding.Mesh) -> tuple[dict[str, dict], list[np.ndarray]]:
    """Three optimizer steps on three, two and one micro-batches; parameters, and losses and norms of each step."""
    objective = surrogate(kl="k3")
    # Adam divides by what may be rounding alone: at this rate that stays below the tolerance.
    update = learner.build_update(objective, mesh, rate=1e-4)
    update.accumulate, update.apply = accumulate, apply = Watched(update.accumulate), Watched(update.apply)
    prepare = Watched(
        build_prepare({"m": learner.ARCHITECTURE}, {"m": objective}, {"m": "m"}, group_relative(), 8, 32, mesh)
    )
    state = update.initialize(learner.parameters())
    reference = update.initialize(learner.parameters(1)).params
    numbers = []
    for groups in (GROUPS, GROUPS[:4], GROUPS[:1]):
        packed = pack_groups(groups, pay(groups), rows=ROWS, tokens=TOKENS, max_micro=3, max_segments=4)
        num_micro = {"m": np.int32(packed.num_micro)}
        batch = {"m": update.put(packed.batch)}
        prepared = prepare({"m": state.params}, {"m": reference}, batch, num_micro, learner.COEFFICIENTS)
        state, sums, applied = update.step(
            state, prepared.batches["m"], prepared.counts["m"], learner.COEFFICIENTS, range(packed.num_micro)
        )
        numbers.append(
            [packed.num_micro, *(float(sums[f"loss/{n}"].value()) for n in ("surrogate", "kl")), applied.grad_norm]
        )
    programs = {"prepare": prepare, "accumulate": accumulate, "apply": apply}
    arrays = [np.asarray(leaf) for leaf in jax.device_get(jax.tree.leaves(state.params))]
    return {name: program.report() for name, program in programs.items()}, [np.array(numbers), *arrays]


def study() -> None:
    folder, reports = Path(os.environ["RLRAG_TEST_OUT"]), {}
    for name, (data, model, replica) in MESHES.items():
        mesh = make_mesh(data, model, replica=replica)
        with jax.set_mesh(mesh):
            programs, arrays = learn(mesh)
            advance, prints = roll_out(mesh)
        reports[name] = {"programs": programs | {"advance": advance}, "fingerprint": prints}
        np.savez(folder / f"{name}.npz", *arrays)
    (folder / "reports.json").write_text(json.dumps(reports))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture
def reports(run_on_devices, folder, monkeypatch) -> dict:
    if not (folder / "reports.json").exists():
        monkeypatch.setenv("RLRAG_TEST_OUT", str(folder))
        run_on_devices(study, 8)
    return json.loads((folder / "reports.json").read_text())


@pytest.fixture(scope="module")
def alone() -> tuple[str, list[np.ndarray]]:
    """The same on one device."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return roll_out(mesh)[1], learn(mesh)[1]


@pytest.mark.parametrize("mesh", MESHES)
def test_every_program_is_compiled_once(reports, mesh):
    """Whatever the number of micro-batches, rollouts, stop strings; whatever the second call gets from the first."""
    compiled = {name: report["compiled"] for name, report in reports[mesh]["programs"].items()}
    assert compiled == {"prepare": 1, "accumulate": 1, "apply": 1, "advance": 1}


# Everything that may be said, by mesh and program. D = 16, F = 24, V = 64, K * H = 8; a micro-batch has 8 x 96 tokens.
# Parameters of a layer, and the tied embedding, gathered by FSDP (with a model axis: the half a device works on).
GATHERED = {
    "8x1": "all-gather f32[16,16] f32[16,8] f32[16,24] f32[24,16] f32[64,16]",
    "4x2": "all-gather f32[16,8] f32[16,4] f32[16,12] f32[12,16] f32[8,16] f32[32,16]",
}
# Partial results of the model axis: hidden states, and per token the log-sum-exp and the wanted logits. Never logits of
# the vocabulary, which would be [192, 64].
PARTIAL = {"8x1": "", "4x2": "all-reduce f32[192,16] f32[192] f32[192,4]"}
# Gradients, summed over data; the sums of metrics, of which some are by role (1) and by turn (8).
GRADIENTS = {
    "8x1": "all-reduce f32[16,16] f32[8,16] f32[16,24] f32[24,16] f32[64,16] f32[16] f32[4] f32[] f32[1] f32[8]",
    "4x2": "all-reduce f32[16,8] f32[8,16] f32[4,16] f32[16,12] f32[12,16] f32[32,16] f32[16] f32[4] f32[] "
    "f32[1] f32[8]",
}
# Decoding, two slots a shard, and chunks of 12 tokens. The embedding, then attention and MLP of each layer, are summed
# over model, D = 32; logits, V = 64, are gathered; and the number of steps, the same on all shards.
DECODED = {"8x1": "", "4x2": "all-reduce f32[2,32] f32[12,32] s32[] all-gather f32[2,64]"}
# The table of segments, from which credit is summed; counts of each micro-batch; whether any token is forced.
CREDIT = "all-gather s32[3,8,4] f32[3,8,4] all-reduce f32[3] pred[]"
# How many columns are trained: what the head is multiplied for.
TRAINED = "all-reduce s32[]"


def entries(words: str) -> set[str]:
    """The operation stands before its shapes: "all-gather f32[2] f32[3]" is two entries."""
    found, operation = set(), ""
    for word in words.split():
        if word in OPERATIONS:
            operation = word
        else:
            found.add(f"{operation} {word}")
    return found


@pytest.mark.parametrize("mesh", LISTED)
@pytest.mark.parametrize("program", ["advance", "prepare", "accumulate", "apply"])
def test_collectives(reports, mesh, program):
    allowed = {
        "advance": DECODED[mesh],
        "prepare": f"{GATHERED[mesh]} {PARTIAL[mesh]} {CREDIT} {TRAINED}",
        "accumulate": f"{GATHERED[mesh]} {PARTIAL[mesh]} {GRADIENTS[mesh]} {TRAINED}",
        "apply": "all-reduce f32[] pred[]",
    }
    found = reports[mesh]["programs"][program]["collectives"]
    print(f"\n{mesh} {program}: {found or 'none'}")
    assert set(found) <= entries(allowed[program])
    if program == "accumulate":
        assert any(name.startswith(("all-reduce", "reduce-scatter")) for name in found), (
            "gradients are summed over data"
        )


@pytest.mark.parametrize("mesh", MESHES)
def test_steps_are_those_of_one_device(reports, folder, alone, mesh):
    with np.load(folder / f"{mesh}.npz") as file:
        arrays = [file[name] for name in file.files]
    assert arrays[0][:, 0].tolist() == [3, 2, 1], "numbers of micro-batches"
    start = jax.tree.leaves(learner.parameters())
    for wanted, found in zip(alone[1], arrays, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=1e-5)
    assert max(float(np.abs(wanted - before).max()) for wanted, before in zip(alone[1][1:], start)) > 2e-4


@pytest.mark.parametrize("mesh", MESHES)
def test_rollouts_are_those_of_one_device(reports, alone, mesh):
    assert reports[mesh]["fingerprint"] == alone[0]
