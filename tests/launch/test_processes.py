"""Where a process stands, what is told of it, and several of them on one machine."""

import subprocess
import sys
import time

import jax
import pytest
import yaml
from absl import flags

import rlrag.processes
from launch import processes
from launch.flags import Mistake, ours
from launch.processes import GONE, Place, define_flags, environment_of, explain_lost, find_place, own_devices, wait
from tests.conftest import REPOSITORY

LAUNCH = REPOSITORY / "launch"
# Of JAX's client, and of a collective, whose peer was killed while they waited or before.
SAID = [
    "UNAVAILABLE: Socket closed\nAdditional GRPC error information from remote target coordination_service while ...",
    "UNAVAILABLE: recvmsg:Connection reset by peer\nAdditional GRPC error information from remote target ...",
    f"INTERNAL: {'Error dispatching computation: ' * 9}Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:8",
]
FOUR = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}


def found(arguments=(), **environment):
    values = flags.FlagValues()
    define_flags(values)
    values(["program", *arguments])
    return find_place(values, environment)


@pytest.mark.parametrize(
    ("arguments", "environment", "wanted"),
    [
        ((), {}, None),
        (("--coordinator=a:1", "--num_processes=2", "--process_id=1"), {}, Place("a:1", 2, 1)),
        ((), {**FOUR, "JAX_PROCESS_ID": "3"}, Place("a:1", 4, 3)),
        ((), {**FOUR, "JOB_COMPLETION_INDEX": "2"}, Place("a:1", 4, 2)),
        ((), {"SLURM_STEP_NUM_TASKS": "2"}, Place()),
        ((), {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, None),  # in the batch script itself
        ((), {"OMPI_COMM_WORLD_SIZE": "3"}, Place()),
        ((), {"TPU_WORKER_HOSTNAMES": "a,b"}, Place()),
        ((), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (("--distributed",), {}, Place()),
    ],
)  # fmt: skip
def test_a_process_finds_its_place(arguments, environment, wanted):
    assert found(arguments, **environment) == wanted


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (("--coordinator=a:1",), {}, "--num_processes is missing: give all of --coordinator, --num_pro"),
        (("--coordinator=a", "--num_processes=2", "--process_id=1"), {}, "the coordinator is 'a': give host:port"),
        (("--coordinator=a:1", "--num_processes=2", "--process_id=2"), {}, "--process_id is 2, of 2 processes: number"),
        ((), FOUR, "JAX_PROCESS_ID is not set: set all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and"),
        ((), {"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES is not set"),
        ((), {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set"),
        ((), {**FOUR, "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "whole numbers"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_told(arguments, environment, told):
    with pytest.raises(Mistake, match=told):
        found(arguments, **environment)


def test_the_local_run_tells_each_process_its_place():
    own = environment_of(1, 3, 2, 1234, {"XLA_FLAGS": "--a=b", "JAX_PLATFORMS": "cpu"})
    assert found(**own) == Place("127.0.0.1:1234", 3, 1)
    assert own["JAX_COORDINATOR_BIND_ADDRESS"] == "127.0.0.1:1234", "no other machine is listened to"
    assert own["XLA_FLAGS"] == "--a=b --xla_force_host_platform_device_count=2"
    assert own["JAX_LOCAL_DEVICE_IDS"] == "2,3", "on GPUs"


def test_an_error_of_a_lost_peer_is_told_in_a_line():
    told = explain_lost(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:8865\nmore"))
    assert told is not None
    assert "another process of this training is gone" in told
    assert "\n" not in told
    assert explain_lost(ConnectionResetError(104, "Connection reset by peer")) is None, "a server of retrieval"
    with pytest.raises(Mistake) as ours:
        found(("--coordinator=NCCL", "--num_processes=2", "--process_id=1"))
    assert explain_lost(ours.value) is None, "a name in a message of ours"


@pytest.mark.parametrize("text", SAID)
def test_whoever_called_what_raised_it_a_lost_peer_is_told(text):
    """An error raised in C++ has the traceback of its caller alone, which may be ours, as in rlrag.processes.gather."""
    for kind in (jax.errors.JaxRuntimeError, ValueError):
        with pytest.raises(kind) as raised:
            exec(compile("raise kind(text)", rlrag.processes.__file__, "exec"), {"kind": kind, "text": text})
        assert ours(raised.value)
        assert "another process of this training is gone" in (explain_lost(raised.value) or "")


def test_an_error_is_a_lost_peers_where_that_caused_it():
    lost = RuntimeError("UNAVAILABLE: Failed to send RPC to coordination service")
    own = Mistake("checkpoint 8 cannot be written")
    own.__cause__ = lost
    assert "another process of this training is gone" in (explain_lost(own) or "")
    closing = KeyError("closing")
    closing.__context__ = lost
    assert "another process of this training is gone" in (explain_lost(closing) or "")
    closing.__suppress_context__ = True
    assert explain_lost(closing) is None, "raised `from None`: it has nothing to do with it"


JOINED = """
import os, sys
import jax
from absl import flags
from launch import processes
values = flags.FlagValues()
processes.define_flags(values)
values(sys.argv[:1])
processes.find_place = lambda *_: processes.Place("localhost:1", 2, 1)
processes.join = lambda *_: None
jax.process_index, jax.process_count = lambda: 1, lambda: 2
with processes.joined(values):
    RAISES
"""
LOST = 'raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")'


@pytest.mark.parametrize(
    ("raises", "status", "told"),
    [
        (LOST, 1, "another process of this training is gone, see what it said: the same command on every host goes on "
                  "from the last checkpoint (UNAVAILABLE: Socket closed)"),
        ("raise processes.Mistake('not so')", 2, "not so"),
        ("raise KeyError('a fault')", 1, "KeyError: 'a fault' (the traceback is above)"),
        ("raise KeyboardInterrupt", 130, "interrupted: the same command on every host goes on from the last "
                                         "checkpoint"),
        # JAX ends the process while the error is on its way.
        ("processes.explain = processes.explain_lost = lambda _: os.abort(); 1 / 0", -6, None),
    ],
    ids=["lost", "mistake", "fault", "interrupted", "aborted"],
)  # fmt: skip
def test_the_last_line_of_a_process_among_several_says_why_it_ended(raises, status, told):
    done = python("-c", JOINED.replace("RAISES", raises))
    first, *above, last = done.stderr.splitlines()
    assert first == "process 1 of 2: waiting for the others"
    assert (done.returncode, last) == (status, f"error: process 1 of 2{': ' if told else ' was ended: '}{told or GONE}")
    assert any("Traceback" in line for line in above) == ("traceback is above" in last)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_GPUS_ON_NODE": "8"}, None),  # one each, which JAX finds
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({}, None),
    ],
)
def test_a_task_that_has_its_host_to_itself_has_all_its_gpus(environment, wanted):
    assert own_devices(environment) == wanted


LEAVES = """
import os, sys
from launch.processes import speak_last
silence = speak_last("error: last words")
if sys.argv[1] == "abort": os.abort()
if sys.argv[1] == "silence": silence()
"""


@pytest.mark.parametrize(("how", "told"), [("abort", "error: last words\n"), ("end", ""), ("silence", "")])
def test_last_words_are_spoken_where_python_could_not(how, told):
    done = python("-c", LEAVES, how)
    assert done.stderr == told
    assert (done.returncode == 0) == (how != "abort")


def python(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def children(*sources):
    return [subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.DEVNULL) for source in sources]


def test_the_first_failure_is_the_runs_and_ends_the_others(monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    begin = time.monotonic()
    assert wait(children("import sys; sys.exit(3)", "import time; time.sleep(60)")) == 3
    assert time.monotonic() - begin < 30
    assert wait(children("pass", "pass")) == 0
    assert wait(children("import os; os.kill(os.getpid(), 9)")) == 128 + 9


def test_a_run_without_a_command_is_told():
    done = python("-m", "launch.processes", "--count=2")
    assert done.returncode == 2
    assert done.stderr == "error: nothing to run: give -- launch.train --config=... behind the flags\n"


def test_the_launch_files_say_what_the_code_reads():
    (job,) = yaml.safe_load(LAUNCH.joinpath("jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert int(environment["JAX_NUM_PROCESSES"]) == spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    place = found(**environment, JOB_COMPLETION_INDEX="3")
    assert place == Place(f"rlrag-{job['name']}-0-0.rlrag:8476", 4, 3)
    assert container["ports"] == [{"containerPort": 8476}]
    script = LAUNCH / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    for text in (script.read_text(), " ".join(container["args"])):
        assert "--asked_status=75" in text, "to a scheduler 0 is finished"
