"""Several processes of one command: their options, and who speaks."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Annotated

from deer_jax import processes
from deer_jax.cli import progress
from deer_jax.errors import InputError
from deer_jax.processes import TIMEOUT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """several hosts"""

    coordinator: Annotated[
        str | None,
        "address of process 0, the same for all. With launch/tpu_pod.sh, GKE, SLURM and Open MPI none of these is "
        "needed; on other Cloud TPU machines say 'environment', which asks them",
        "HOST:PORT",
    ] = None
    processes: Annotated[int | None, "how many processes run this command, usually one a host"] = None
    process: Annotated[int | None, "which of them this is, from 0", "I"] = None
    wait: Annotated[float, "seconds that processes wait for each other at the start", "SECONDS"] = TIMEOUT

    def join(self) -> None:
        """Join the other processes, if there are any, before JAX does anything; only the lead reports progress. A step
        of a pipeline has them already."""
        if processes.started():
            return
        if not 1 <= self.wait < 10**6:
            raise InputError(f"--wait must be at least 1, got {self.wait:g}")
        if (self.coordinator, self.processes, self.process) == ("environment", None, None):
            processes.start(timeout=self.wait)
        elif (self.coordinator, self.processes, self.process) != (None, None, None):
            processes.start(self.coordinator, self.processes, self.process, self.wait)
        elif said(os.environ):
            processes.start(timeout=self.wait)
        if processes.started():  # asked first: anything else would begin with the devices, alone too
            if not processes.lead():
                progress.speak_as(f"process {processes.number()}")
            processes.watch(_gone)


def _gone(number: int) -> None:
    """End at once: what this one is in waits for the other. What is on the disk is whole, as after a kill."""
    progress.say(f"error: another process has ended, so this one cannot go on; start all again (no sign of {number})")
    os._exit(1)


def said(environment: Mapping[str, str]) -> bool:
    """Whether an environment says that this is one of several processes; JAX finds out which."""

    def number(name: str) -> int:
        found = environment.get(name, "")
        return int(found) if found.isdecimal() else 0

    return (
        number("SLURM_STEP_NUM_TASKS") > 1  # of this step: a shell in an allocation is alone
        or number("OMPI_COMM_WORLD_SIZE") > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or number("MEGASCALE_NUM_SLICES") > 1
        or environment.get("DEER_JAX_PROCESSES") == "environment"  # launch/tpu_pod.sh, where nothing else says it
    )
