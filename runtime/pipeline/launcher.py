"""Starts a plan's processes by torchrun, here, and says how torchrun starts them on several hosts."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from planner.errors import ConstraintError, MachineError
from planner.plan import Plan
from runtime.pipeline.launched import LOOPBACK
from runtime.pipeline.places import stages_on
from runtime.pipeline.watch import EXIT_CODE, INTERRUPTED, PipelineError

SHUTDOWN_S = 5
"""How long torchrun lets processes end by themselves; its own default of 30 s would outlast the job by as much."""
PORT = 29400


def torchrun_arguments(plan: Plan, program: Sequence[str], host: str, rendezvous: str | None) -> list[str]:
    """What torchrun is told on a host: as many processes as the plan has stages there, running `program`.

    `program` is a script, or `-m` and a module, with arguments. `rendezvous` is where hosts meet, `HOST:PORT`; None for
    a plan of one host, which stays on the loopback interface.
    """
    num_hosts = len(plan.machine.hosts)
    endpoint = rendezvous or f"{LOOPBACK[0]}:0"
    # Else torchrun lets processes meet under the host's own name, on an interface that others can reach.
    local = ["--local-addr", LOOPBACK[0]] if endpoint.rpartition(":")[0] in LOOPBACK else []
    return [
        *("--nnodes", str(num_hosts)),
        *("--nproc-per-node", str(len(stages_on(plan, host)))),
        *("--rdzv-backend", "c10d"),
        *("--rdzv-id", f"plan-devices-{plan.fingerprint}"),
        *("--rdzv-endpoint", endpoint),
        *local,
        *("--max-restarts", "0"),
        *("--shutdown-timeout", str(SHUTDOWN_S)),
        *program,
    ]


def host_commands(plan: Plan, program: Sequence[str], rendezvous: str | None) -> dict[str, str]:
    """The command line for every host of a plan."""
    where = rendezvous or f"{plan.machine.hosts[0]}:{PORT}"
    return {
        host: shlex.join(["torchrun", *torchrun_arguments(plan, [*program, "--host", host], host, where)])
        for host in plan.machine.hosts
    }


def launch(plan: Plan, program: Sequence[str], host: str | None = None, rendezvous: str | None = None) -> int:
    """Run a plan's processes of this host to their end; their exit code, which is the same for all.

    Raises: MachineError for a host that the plan does not have; ConstraintError for several hosts without a place to
    meet; PipelineError when processes ended before they could say why.
    """
    hosts = plan.machine.hosts
    name = hosts[0] if host is None else host
    if name not in hosts:
        raise MachineError(f"the plan has no host {name!r}: its hosts are {', '.join(hosts) or 'unnamed'}")
    if len(hosts) > 1 and rendezvous is None:
        raise ConstraintError(f"hosts {', '.join(hosts)} need a place to meet: --rendezvous {hosts[0]}:{PORT}")
    # Each stage's arithmetic is on its GPU: threads of the host only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = torchrun_arguments(plan, program, name, rendezvous if len(hosts) > 1 else None)
    with TemporaryDirectory(prefix="plan-devices-") as folder, _quiet():
        try:
            torchrun.run(torchrun.parse_args(["--log-dir", folder, *arguments]))
        except ChildFailedError as problem:
            return _exit_code(Path(folder), list(problem.failures.values()))
        except SignalException:
            return INTERRUPTED
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torchrun logs of a failure: the processes themselves have said it in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def program_of(arguments: Sequence[str], plan: Path) -> list[str]:
    """What the processes run: a script of the caller's, or `plan-devices run --pipeline` with these arguments."""
    if arguments and arguments[0].endswith(".py"):
        return list(arguments)
    return ["-m", "planner", "run", *arguments, "--pipeline", "--plan", str(plan)]


def _exit_code(folder: Path, failures: Sequence[ProcessFailure]) -> int:
    """The code that the processes' own message goes with, or that one ended with by itself.

    Raises: PipelineError when a process ended without a word.
    """
    for path in folder.rglob("error.json"):
        content = json.loads(path.read_text())
        if EXIT_CODE in content:
            return int(content[EXIT_CODE])
    first = min(failures, key=lambda failure: failure.timestamp)
    if first.exitcode > 0:
        return first.exitcode
    problem = PipelineError(
        f"process {first.local_rank} of this host ended by {first.signal_name()} before the pipeline had begun: see "
        "what it said above, or how much memory the host has"
    )
    problem.is_reported = False
    raise problem
