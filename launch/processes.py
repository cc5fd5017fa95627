"""Join the processes of a training, and start several on one machine:

    python -m launch.processes --count=2 --devices=2 -- launch.train --config=configs/search_grpo.py --workdir=runs/two

On a pod the same command runs on every host, and each finds the others: in a Slurm step (launch/slurm.sbatch), by
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID or a Job's completion index (launch/jobset.yaml), on a TPU
pod, or by --coordinator, --num_processes and --process_id.
"""

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from launch.flags import Mistake, explain, ours, run

ADDRESS, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
COME_S = 300  # how long processes wait for each other at the start
HEARTBEAT_S = 30  # a process of which nothing was heard for so long is taken for gone
SPEAK_S = 3.0  # how long the first, whose end ends the others, leaves them to say what they have to say
GRACE_S = 60.0  # how long processes have to end by themselves when one is gone
GONE = (
    "another process of this training is gone, see what it said: the same command on every host goes on from the last "
    "checkpoint"
)
COME = (
    f"the processes did not come together within {COME_S} s: start the same command on every host, and see that each "
    "reaches the coordinator's address"
)
# What XLA's collectives and the client of JAX's service say when a peer no longer answers.
LOST = (
    *("Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "heartbeat"),
    *("UNAVAILABLE: ", "coordination service", "CoordinationService", "coordination_service"),
)
# An error raised in C++ has the traceback of its caller, which may be us: XLA's begin with the name of a status.
STATUS = re.compile(r"[A-Z_]+: ")
# Speaks when the process that holds the other end of its standard input ends without a word.
LAST_WORDS = "import sys\nif not sys.stdin.buffer.read(): print(sys.argv[1], file=sys.stderr)"


class Place(NamedTuple):
    """Where this process stands. coordinator: host:port of the first; empty: JAX's own detection finds everything."""

    coordinator: str = ""
    count: int = 0
    index: int = 0


def define_flags(values: flags.FlagValues) -> None:
    """Of a program that may run in several processes."""
    flags.DEFINE_string("coordinator", None, "host:port of the first of several processes.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("distributed", False, "Ask JAX to find the others, as on a Cloud TPU pod.", flag_values=values)
    flags.DEFINE_integer(
        "asked_status", 0, "Exit status of a run that was asked to end, and saved: where 0 would mean finished.",
        lower_bound=0, upper_bound=255, flag_values=values,
    )  # fmt: skip


def find_place(values: flags.FlagValues, environment: Mapping[str, str]) -> Place | None:
    """Where this process stands; None: it is alone. Raises Mistake where only a part of it is told."""
    told = {"coordinator": values.coordinator, "num_processes": values.num_processes, "process_id": values.process_id}
    if any(value is not None for value in told.values()):
        missing = [name for name, value in told.items() if value is None]
        if missing:
            raise Mistake(f"--{missing[0]} is missing: give all of --{', --'.join(told)}, or none")
        return place(values.coordinator, values.num_processes, values.process_id, "--process_id")
    if any(name in environment for name in (ADDRESS, COUNT, ID)):
        known = {ID: environment.get("JOB_COMPLETION_INDEX"), **environment}
        missing = [name for name in (ADDRESS, COUNT, ID) if known.get(name) is None]
        if missing:
            raise Mistake(f"{missing[0]} is not set: set all of {ADDRESS}, {COUNT} and {ID} (from 0), or none")
        return place(known[ADDRESS], known[COUNT], known[ID], ID)
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1"), environment.get("OMPI_COMM_WORLD_SIZE", "1")
    several = any(each.isdecimal() and int(each) > 1 for each in tasks)
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    return Place() if values.distributed or several or pod else None


def place(coordinator: str, count: Any, index: Any, named: str) -> Place:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise Mistake(f"the coordinator is {coordinator!r}: give host:port of the first process")
    try:
        count, index = int(count), int(index)
    except ValueError:
        raise Mistake(f"{named} is {index!r} of {count!r} processes: give whole numbers") from None
    if not 0 <= index < count:
        raise Mistake(f"{named} is {index}, of {count} processes: number them from 0 to {count - 1}")
    return Place(coordinator, count, index)


@contextlib.contextmanager
def joined(values: flags.FlagValues) -> Iterator[None]:
    """This process among the others, where there are any; the work inside is theirs together.

    An error is told in one line and ends the process at once: the others wait for it, and learn so that it is gone.
    """
    where = find_place(values, os.environ)
    if where is None:
        yield
        return
    who = f"process {where.index} of {where.count}" if where.coordinator else "this process"
    print(f"{who}: waiting for the others", file=sys.stderr, flush=True)
    silence = speak_last(f"error: {who}: {COME}")
    try:
        join(where, os.environ)
    finally:
        silence()
    from rlrag import processes
    from rlrag.console import console

    console.quiet = not processes.is_first()  # all would say the same
    silence = speak_last(f"error: process {processes.index()} of {processes.count()} was ended: {GONE}")
    try:
        yield
    except Exception as error:
        told = explain_lost(error) or explain(error)
        if told is None or "--traceback" in sys.argv:
            traceback.print_exc()
        told = told or f"{type(error).__name__}: {str(error)[:200]} (the traceback is above)"
        leave(
            f"process {processes.index()} of {processes.count()}: {told}",
            2 if isinstance(error, Mistake) else 1,  # as launch.flags.run
            silence,
        )
    except KeyboardInterrupt:
        told = f"interrupted: {GONE.partition(': ')[2]}"
        leave(f"process {processes.index()} of {processes.count()}: {told}", 130, silence)
    silence()


def join(where: Place, environment: Mapping[str, str]) -> None:
    """Raises ValueError where that cannot be; where the others do not come JAX ends the process."""
    import jax

    with contextlib.suppress(AttributeError):  # SIGTERM is handled by rlrag.signals
        jax.config.update("jax_enable_preemption_service", False)
    told: dict[str, Any] = {"local_device_ids": own_devices(environment)}
    if where.coordinator:  # all is said: JAX's detection would look on, and warn
        told = {"coordinator_address": where.coordinator, "num_processes": where.count, "process_id": where.index}
        told["cluster_detection_method"] = "deactivate"
        if where.coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost"):
            told["coordinator_bind_address"] = where.coordinator
    try:
        jax.distributed.initialize(
            **told, initialization_timeout=COME_S, heartbeat_timeout_seconds=HEARTBEAT_S, shutdown_timeout_seconds=60
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"this process cannot take its place at {where.coordinator or 'a coordinator'} ({reason}): give a free "
            "port of the first host in --coordinator, and --num_processes and --process_id"
        ) from error


def own_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of a Slurm task that has its host to itself, of which JAX would take one; None: what JAX takes."""
    alone = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if alone and gpus.isdecimal() else None


def explain_lost(error: Exception) -> str | None:
    """The line for an error of JAX that lost a peer, or for one that came of it: raised from it, or while it passed."""
    cause: BaseException | None = error
    while cause is not None:
        library = isinstance(cause, ValueError | RuntimeError) and (STATUS.match(str(cause)) or not ours(cause))
        if library and any(mark in str(cause) for mark in LOST):
            said = str(cause).splitlines()[0].rpartition("Error dispatching computation: ")[2]  # of others, many times
            return f"{GONE} ({said[:160]})"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def speak_last(text: str) -> Callable[..., None]:
    """Let a small process say something if this one ends without a word: JAX ends a process that has lost another from
    within C++, where no Python runs. Returns what calls that off, and waits for that unless told wait=False."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", LAST_WORDS, text], stdin=subprocess.PIPE, start_new_session=True
    )
    assert child.stdin is not None
    pipe, done = child.stdin, threading.Event()

    def silence(wait: bool = True) -> None:
        if not done.is_set():
            done.set()
            with contextlib.suppress(OSError):
                pipe.write(b"done")
                pipe.close()
            if wait:
                child.wait()

    atexit.register(silence)
    return silence


def leave(text: str, status: int, silence: Callable[..., None]) -> None:
    """Say it, call off the last words and end, without the farewells of JAX's service, which wait for the others."""
    sys.stdout.flush()
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    silence(wait=False)  # not before, and then at once: JAX may end the process at any moment, with lines of its own
    from rlrag import processes

    if processes.is_first():
        time.sleep(SPEAK_S)
    os._exit(status)


# -- several processes on one machine ---------------------------------------------------------------------------------


def define_runner(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_integer("count", None, "How many processes.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("devices", 1, "Devices of each: virtual ones on a CPU.", lower_bound=1, flag_values=values)


def environment_of(index: int, count: int, devices: int, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """Of one process of a local run."""
    address = f"127.0.0.1:{port}"
    own = {ADDRESS: address, COUNT: str(count), ID: str(index), "JAX_COORDINATOR_BIND_ADDRESS": address}
    # Each is read by its own platform alone.
    own["XLA_FLAGS"] = f"{base.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    own["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(index * devices + number) for number in range(devices))
    return {**base, **own}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: Sequence[str], count: int, devices: int) -> int:
    """Run `python -m command` in so many processes until they end; the first exit status that is not 0. Signals go on
    to all of them; what all but the first print is marked with their number."""
    port, echoes = free_port(), []
    children: list[subprocess.Popen] = []

    def forward(number: int, _: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    for index in range(count):
        pipe = None if index == 0 else subprocess.PIPE
        child = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment_of(index, count, devices, port, os.environ),
            stdout=pipe, stderr=None if pipe is None else subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        children.append(child)
        if pipe is not None:
            echoes.append(threading.Thread(target=echo, args=(index, child.stdout), daemon=True))
            echoes[-1].start()
    status = wait(children)
    for thread in echoes:  # a child's last words come after its end
        thread.join(timeout=2.0)
    return status


def wait(children: Sequence[subprocess.Popen]) -> int:
    failed: tuple[int, float] | None = None  # status, when
    while any(child.poll() is None for child in children):
        status = next((child.returncode for child in children if child.returncode), 0)
        if status and failed is None:
            failed = status, time.monotonic()
        if failed and time.monotonic() - failed[1] > GRACE_S:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.1)
    status = failed[0] if failed else next((child.returncode for child in children if child.returncode), 0)
    return 128 - status if status < 0 else status


def echo(index: int, stream: Any) -> None:
    for line in stream:
        sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")


def main(values: flags.FlagValues, command: Sequence[str]) -> None:
    if not command:
        raise Mistake("nothing to run: give -- launch.train --config=... behind the flags")
    sys.exit(start(command, values.count, values.devices))


if __name__ == "__main__":
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    run(
        lambda values: main(values, sys.argv[cut + 1 :]),
        define_runner,
        required={"count": "2"},
        doc=__doc__,
        argv=sys.argv[:cut],
    )
