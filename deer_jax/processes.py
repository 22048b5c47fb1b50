"""Several processes of one run, usually one a host: the only file that knows whether there are any.

Every process runs the same program and calls the functions here in the same order; what one of them alone decides, has
read or was told reaches the others through them. With one process they cost nothing.

    lead()  who writes files and says things       led(f)      done by the lead, its text or its error for all
    agree(flag)  whether any says so               every(f)    done by each, the texts or the first error for all
    least(n)  the smallest number                  same(...)   InputError if they were started differently
    Share   which rows of a batch to read          fetch(tree) whole arrays on every host
"""

import contextlib
import hashlib
import importlib.metadata
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # no public way to a barrier with a time limit
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from deer_jax.errors import InputError, RunError, one_line
from deer_jax.formats import differences

Made = TypeVar("Made")
TIMEOUT = 300.0  # seconds that processes wait for each other at the start
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead, and the others end
REPLY = "deer_jax: "  # before what the coordinator says; whatever else answers there is something else
GO = "go"
LEAVING = 5.0  # seconds that one that ends waits for the others to end too
AGREED_WITHIN = 1.0  # seconds, about, until all know what one was told


def count() -> int:
    """How many there are."""
    return jax.process_count()


def number() -> int:
    """Which one this is, from 0."""
    return jax.process_index()


def lead() -> bool:
    """Whether this is the one that writes files and speaks."""
    return number() == 0


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: float = TIMEOUT
) -> None:
    """Join the other processes; before anything else that JAX does.

    Args:
      coordinator: HOST:PORT of process 0. With the two others it is needed where the environment (TPU, GKE, SLURM,
        Open MPI) does not say all three.
      processes: how many there are. process: which one this is, from 0.
      timeout: seconds to wait for the others.

    Raises InputError for numbers that cannot be, or processes of other code than the lead's; RunError if one does not
    come within the limit.
    """
    given = [coordinator, processes, process]
    if any(each is None for each in given) != all(each is None for each in given):
        raise InputError("several processes need --coordinator HOST:PORT, --processes N and --process I together")
    if coordinator is not None and processes is not None and process is not None:
        if processes < 1 or not 0 <= process < processes:
            raise InputError(f"process {process} of {processes}: they are numbered from 0 to {processes - 1}")
        host, colon, port = coordinator.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"coordinator '{coordinator:.80}' must be HOST:PORT, as in 10.0.0.2:8476")
        _meet(host, int(port), processes, process, timeout)
    # It would catch SIGTERM, which is ours: see `agreed`.
    jax.config.update("jax_enable_preemption_service", False)
    # Otherwise JAX aborts the others where one dies; what they are in fails instead, and they end with a line.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=max(1, round(timeout)),
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except ValueError as error:  # of the detection of clusters
        raise InputError(
            "the environment does not say which processes there are: give --coordinator HOST:PORT, --processes N and "
            f"--process I ({one_line(error)})"
        ) from None
    except RuntimeError as error:
        raise RunError(f"the processes do not find each other: {one_line(error)}") from None
    same({"code": _code()})


def _meet(host: str, port: int, processes: int, process: int, timeout: float) -> None:
    """Wait until all processes are there; the line for who is not. Where JAX waits in vain it aborts the process."""
    end = time.monotonic() + timeout
    if process == 0:
        _receive(host, port, processes, end, timeout)
        return
    why = "it does not answer"
    while time.monotonic() < end:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())) as connection:
                connection.sendall(f"{process}\n".encode())
                connection.settimeout(timeout + LEAVING)  # it may have begun to wait later than this one
                answer = connection.makefile("r", encoding="utf-8", errors="replace").readline(1000).strip()
            if answer == REPLY + GO:
                return
            if answer.startswith(REPLY):
                raise RunError(answer.removeprefix(REPLY))
            if answer:
                why = "something else answers there, or the run has begun already"
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(0.1)
    raise RunError(f"the coordinator {host}:{port} did not come within {timeout:g} s ({why}); start process 0 there")


def _receive(host: str, port: int, processes: int, end: float, timeout: float) -> None:
    """The coordinator's part: it tells those that come when all are there, or who is not."""
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=processes
        )
    except OSError as error:
        raise InputError(f"coordinator {host}:{port}: {error.strerror}; process 0 needs a free port there") from None
    found: dict[int, socket.socket] = {}
    with server, contextlib.ExitStack() as connections:
        while len(found) < processes - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError):
                connection = connections.enter_context(server.accept()[0])
                connection.settimeout(min(left, LEAVING))
                said = connection.recv(20).strip()
                if said.isdigit() and 0 < int(said) < processes:
                    found[int(said)] = connection
        late = [str(each) for each in range(1, processes) if each not in found]
        line = GO
        if late:
            who = f"process {', '.join(late[:10])}{', ...' if len(late) > 10 else ''}"
            line = f"{who} did not come to the coordinator {host}:{port} within {timeout:g} s; start all of them"
        for connection in found.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{REPLY}{line}\n".encode())
                connection.recv(1)  # they close first, so that the port is free at once
    if late:
        raise RunError(line)


def _code() -> dict[str, str]:
    """What decides what a program does, besides its options."""
    digest, package = hashlib.sha256(), Path(__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "grain")}
    return {"deer_jax": digest.hexdigest()[:16]} | versions


def started() -> bool:
    """Whether `start` has joined several."""
    return distributed.global_state.client is not None


def lost(error: BaseException) -> bool:
    """Whether an error of JAX says that another process is gone."""
    return any(word in str(error) for word in ("Gloo", "gloo", "oordination service", "onnection", "heartbeat"))


LEFT = "left"  # the last sign of life of one that has done its work
_leaving = threading.Event()


def watch(gone: Callable[[int], Any]) -> None:
    """Call `gone`, on a thread of its own, with the number of a process that has given no sign of life for HEARTBEAT
    seconds. What runs may wait for it for ever, as where JAX connects devices for a new program."""
    client, own, others = distributed.global_state.client, number(), [i for i in range(count()) if i != number()]
    assert client is not None
    last = dict.fromkeys(others, ("", time.monotonic()))

    def look() -> None:
        beat = 0
        while not _leaving.wait(HEARTBEAT / 10):
            beat += 1
            with contextlib.suppress(Exception):  # what JAX's runtime says where its service is gone or slow
                client.key_value_set(f"deer_jax/alive/{own}", str(beat), allow_overwrite=True)
            for each in others:
                found = last[each][0]
                with contextlib.suppress(Exception):  # one that has not given a sign yet has no entry
                    found = client.key_value_try_get(f"deer_jax/alive/{each}")
                if found != last[each][0]:
                    last[each] = (found, time.monotonic())
                elif found != LEFT and time.monotonic() - last[each][1] > HEARTBEAT and not _leaving.is_set():
                    gone(each)
                    return

    threading.Thread(target=look, name="watch", daemon=True).start()


def leave() -> None:
    """To be called at the end of a program that has called `start`; it is to exit right after.

    Process 0 goes last: with it the connection of the others goes, and JAX aborts who is still there.
    """
    client = distributed.global_state.client
    _leaving.set()
    if client is not None:
        with contextlib.suppress(Exception):  # whatever JAX's runtime says if one of them is gone
            client.key_value_set(f"deer_jax/alive/{number()}", LEFT, allow_overwrite=True)
            client.wait_at_barrier("deer_jax leaves", round(LEAVING * 1000))
        if lead():
            time.sleep(1)


def gather(text: str) -> list[str]:
    """The text of every process, by number."""
    if count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(content.size)))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: content.size] = content
    found = np.asarray(multihost_utils.process_allgather(padded))
    return [found[i, :size].tobytes().decode() for i, size in enumerate(sizes)]


def share(text: str) -> str:
    """The lead's text."""
    return gather(text if lead() else "")[0]


def agree(flag: bool) -> bool:
    """Whether any process says so."""
    return any(gather("1" if flag else "")) if count() > 1 else flag


def total(*numbers: int) -> list[int]:
    """Each number added up over the processes."""
    if count() == 1:
        return list(numbers)
    return np.sum([json.loads(each) for each in gather(json.dumps(numbers))], axis=0).tolist()


def least(number: int) -> int:
    """The smallest of the processes' numbers."""
    return min(map(int, gather(str(number)))) if count() > 1 else number


def led(function: Callable[[], str | None]) -> str:
    """What the lead alone does: its text for all. An InputError or RunError of it is raised by all."""
    return every(function if lead() else lambda: "")[0]


def every(function: Callable[[], str | None]) -> list[str]:
    """What each does by itself: the texts of all. An InputError or RunError of any, the first one's, is raised by
    all."""
    if count() == 1:
        return [function() or ""]
    error = None
    try:
        outcome = ["done", function() or ""]
    except (InputError, RunError) as found:
        error, outcome = found, ["input" if isinstance(found, InputError) else "run", str(found)]
    outcomes = [json.loads(each) for each in gather(json.dumps(outcome))]
    if error is not None:
        raise error
    for kind, text in outcomes:
        if kind != "done":
            raise (InputError if kind == "input" else RunError)(text)
    return [text for _, text in outcomes]


def together(function: Callable[[], Made]) -> Made:
    """What each makes by itself, of files of its own; where one cannot, its InputError or RunError is raised by all."""
    made: list[Made] = []
    every(lambda: made.append(function()))
    return made[0]


def check_devices(devices: Iterable[jax.Device]) -> None:
    """InputError unless every process has some of these devices."""
    found = {device.process_index for device in devices}
    if len(found) < count():
        raise InputError(
            f"{count()} processes run this, and the target is on devices of {len(found)} of them; give a mesh of all "
            f"{jax.device_count()} devices, as in data={jax.device_count()}"
        )


def same(values: Mapping[str, Any]) -> None:
    """InputError where these plain values are not the lead's: it names what differs, and in which process."""
    if count() == 1:
        return
    found = [json.loads(each) for each in gather(json.dumps(values, default=str))]
    for i, theirs in enumerate(found):
        if changes := differences(found[0], theirs):
            more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise InputError(
                f"process {i} was started differently from process 0: {'; '.join(changes[:3])}{more}; start all of "
                "them alike"
            )


def agreed(flag: Callable[[], bool]) -> Callable[[], bool]:
    """A function to be asked once a step by all processes: whether `flag` is true for any of them.

    They exchange it every few steps, as many as the slowest makes in about a second, so that steps do not wait for it.
    """
    if count() == 1:
        return flag
    left, every, begin = 1, 1, time.monotonic()

    def ask() -> bool:
        nonlocal left, every, begin
        left -= 1
        if left:
            return False
        seconds = max(time.monotonic() - begin, 1e-4) / every
        found = [json.loads(each) for each in gather(json.dumps([bool(flag()), seconds]))]
        left = every = max(1, int(AGREED_WITHIN / max(pace for _, pace in found)))
        begin = time.monotonic()
        return any(said for said, _ in found)

    return ask


def fetch(tree: Any) -> Any:
    """The arrays of a tree as whole NumPy arrays on every host, also where their parts lie on others; one at a time."""

    def whole(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable
        return jax.device_get(x) if here else np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


class Share:
    """The rows that this process reads of every batch [parts * rows, ...], which lies as [parts, rows, ...] on a mesh.

    Processes whose devices hold the same rows all read them.

    Attributes:
      rows: int [n]: which rows of the batch, in order.
      own: bool [n]: which of these no earlier process reads too, so that they are counted once.
    """

    def __init__(self, placement: NamedSharding, parts: int, batch: int):
        """placement: of a [parts, batch / parts, ...] array; batch: rows in all."""
        self.placement, self._shape = placement, (parts, batch // parts)
        readers: dict[int, set[int]] = {}  # of each row of a part, the processes
        for device, index in placement.devices_indices_map(self._shape).items():
            for row in range(*index[1].indices(self._shape[1])):
                readers.setdefault(row, set()).add(device.process_index)
        self._columns = np.array([row for row in sorted(readers) if number() in readers[row]], int)
        first = np.array([min(readers[row]) == number() for row in self._columns], bool)
        self.rows = (np.arange(parts)[:, None] * self._shape[1] + self._columns[None]).reshape(-1)
        self.own = np.tile(first, parts)

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The whole batch on the mesh, of which this process has read its rows."""
        parts = self._shape[0]
        local = {name: value.reshape(parts, -1, *value.shape[1:]) for name, value in batch.items()}
        if count() == 1:
            return jax.device_put(local, self.placement)

        def whole(value: np.ndarray) -> jax.Array:
            def piece(index) -> np.ndarray:
                first, last, _ = index[1].indices(self._shape[1])
                start = int(np.searchsorted(self._columns, first))
                return value[:, start : start + last - first]

            return jax.make_array_from_callback((*self._shape, *value.shape[2:]), self.placement, piece)

        return {name: whole(value) for name, value in local.items()}

    def local(self, value: jax.Array) -> np.ndarray:
        """Of an array [parts, rows, ...] that lies like a batch, the rows that this process reads: [n, ...]."""
        parts = self._shape[0]
        found = np.empty((parts, len(self._columns), *value.shape[2:]), value.dtype)
        shards = {shard.index[1].indices(self._shape[1])[0]: shard for shard in value.addressable_shards}
        for first, shard in shards.items():
            start = int(np.searchsorted(self._columns, first))
            found[:, start : start + shard.data.shape[1]] = shard.data
        return found.reshape(-1, *value.shape[2:])
