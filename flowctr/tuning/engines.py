"""Where trials run: processes of this machine, or tasks of a Ray cluster.

An engine says where there is room, starts a command there, and says how it has ended. A command is killed with the
process that started it, so that nothing goes on behind the back of a search that was killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

ENGINES = ("local", "ray")
CPU = -1
SPARE = 1.1  # of the memory that trials have needed so far
MIN_FREE_BYTES = 1 << 30  # less than that and even a small trial has no place
KILLED = -signal.SIGKILL


@dataclass
class Command:
    """A command to run.

    Attributes:
        arguments: Program and arguments, all but ``--gpu``.
        folder: Its working directory.
        variables: What its environment has more than this process's.
        output: File that its output is appended to.
        alone: Whether nothing else may run on its device.
    """

    arguments: Sequence[str]
    folder: Path
    variables: Mapping[str, str]
    output: Path
    alone: bool = False


@dataclass
class Process:
    """A command that runs.

    Attributes:
        command: The command.
        gpu: Its GPU, -1 for the CPU.
        handle: What the engine knows it by.
        evaluated: Whether it has evaluated once, and so has taken all the memory that it needs.
    """

    command: Command
    gpu: int
    handle: Any
    evaluated: bool = False


class Engine(Protocol):
    """A place for commands."""

    def place(self, alone: bool = False) -> int | None:
        """Finds a GPU, or -1 for the CPU, that has room for one more command, or where it would be alone."""

    def start(self, command: Command, gpu: int) -> Process:
        """Starts a command where `place` has found room."""

    def exit_code(self, process: Process) -> int | None:
        """Gives the exit code of a command that has ended; None while it runs."""

    def stop(self, process: Process) -> None:
        """Kills a command and waits until it is gone."""

    def close(self) -> None:
        """Stops all commands."""


class LocalEngine:
    """Processes of this machine.

    Args:
        gpus: GPU indices, -1 for the CPU.
        workers: Commands at a time on each; None: on a GPU as many as its free memory allows, which is known once the
            first has evaluated; on the CPU one for every two cores.

    Raises:
        ValueError: If there is no such GPU, or none with free memory.
    """

    def __init__(self, gpus: Sequence[int], workers: int | None):
        self._running: list[Process] = []
        self._gpus, self._workers = list(dict.fromkeys(gpus)), workers
        self._free = {gpu: _free_memory(gpu) for gpu in self._gpus if gpu != CPU}  # while nothing of ours runs there
        if full := {gpu: free for gpu, free in self._free.items() if free < MIN_FREE_BYTES}:
            listed = ", ".join(f"GPU {gpu} has {free / 2**30:.1f} GiB" for gpu, free in full.items())
            raise ValueError(f"no GPU left: {listed} of free memory; wait, or name other GPUs with --gpu")
        self._needed = dict.fromkeys(self._free, 0)  # bytes of a command, at most so far
        self._capacity_of_cpu = workers or max(1, cores() // 2)

    def place(self, alone: bool = False) -> int | None:
        here = {gpu: [process for process in self._running if process.gpu == gpu] for gpu in self._gpus}
        for gpu in sorted(self._gpus, key=lambda gpu: len(here[gpu])):
            taken_alone = alone or any(process.command.alone for process in here[gpu])
            if not here[gpu] or (not taken_alone and len(here[gpu]) < self._capacity(gpu, here[gpu])):
                return gpu
        return None

    def start(self, command: Command, gpu: int) -> Process:
        threads = {"OMP_NUM_THREADS": str(max(1, cores() // self._capacity_of_cpu))} if gpu == CPU else {}
        process = Process(command, gpu, launch(command, gpu, {**threads, **os.environ}))
        self._running.append(process)
        return process

    def exit_code(self, process: Process) -> int | None:
        code = process.handle.poll()
        if code is not None:
            self._running.remove(process)
        return code

    def stop(self, process: Process) -> None:
        process.handle.kill()
        process.handle.wait()
        self._running.remove(process)

    def close(self) -> None:
        for process in list(self._running):
            self.stop(process)

    def _capacity(self, gpu: int, here: Sequence[Process]) -> int:
        if gpu == CPU:
            return self._capacity_of_cpu
        if self._workers:
            return self._workers
        if all(process.evaluated for process in here):
            used = self._free[gpu] - _free_memory(gpu)
            self._needed[gpu] = max(self._needed[gpu], used // len(here))
        if self._needed[gpu] <= 0:
            return 1
        return min(cores(), int(self._free[gpu] // (SPARE * self._needed[gpu])))


class RayEngine:
    """Tasks of Ray: of the cluster that RAY_ADDRESS names, else of this machine.

    The folders of the search and of the model have to be the same on all machines of a cluster.

    Args:
        gpus: GPU indices or -1; whether there is one above -1 says whether a command takes a GPU. Ray chooses which.
        workers: Commands at a time on each GPU, or on the CPUs of all machines; None: one, and one for every two cores.

    Raises:
        ValueError: If Ray is not installed, or its machines have no GPU.
    """

    def __init__(self, gpus: Sequence[int], workers: int | None):
        try:
            import ray
        except ImportError as error:
            raise ValueError("--engine ray needs ray: pip install 'flowctr[tune]'") from error
        self._running: list[Process] = []
        self._ray = ray
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        resources = ray.cluster_resources()
        self._gpu = CPU if set(gpus) == {CPU} else 0  # the first of those that Ray shows the task
        if self._gpu == CPU:
            cores = int(resources["CPU"])
            self._slots = workers or max(1, cores // 2)
            self._share = {"num_cpus": cores // self._slots or cores / self._slots}  # whole ones, or a part of one
        else:
            self._slots = int(resources.get("GPU", 0)) * (workers or 1)
            self._share = {"num_gpus": 1 / (workers or 1), "num_cpus": 0}
        if not self._slots:
            ray.shutdown()
            raise ValueError("no GPU left: the machines of Ray have none; take --gpu -1")

    def place(self, alone: bool = False) -> int | None:
        alone = alone or any(process.command.alone for process in self._running)
        return self._gpu if len(self._running) < (1 if alone else self._slots) else None

    def start(self, command: Command, gpu: int) -> Process:
        threads = {"OMP_NUM_THREADS": str(max(1, int(self._share["num_cpus"])))} if gpu == CPU else {}
        task = self._ray.remote(max_retries=0, **self._share)(_run)
        process = Process(command, gpu, task.remote(command, gpu, threads))
        self._running.append(process)
        return process

    def exit_code(self, process: Process) -> int | None:
        if not self._ray.wait([process.handle], timeout=0)[0]:
            return None
        self._running.remove(process)
        try:
            return self._ray.get(process.handle)
        except (self._ray.exceptions.RayError, OSError):  # the worker or its machine is gone
            return KILLED

    def stop(self, process: Process) -> None:
        self._ray.cancel(process.handle, force=True)
        self._ray.wait([process.handle])
        self._running.remove(process)

    def close(self) -> None:
        for process in list(self._running):
            self.stop(process)
        self._ray.shutdown()


def make_engine(name: str, gpus: Sequence[int], workers: str) -> Engine:
    """Makes an engine.

    Args:
        name: ``local`` or ``ray``.
        gpus: GPU indices, -1 for the CPU.
        workers: ``auto``, or a number.

    Raises:
        ValueError: If an argument is wrong or there is no such GPU.
    """
    if name not in ENGINES:
        raise ValueError(f"--engine must be one of {', '.join(ENGINES)}; got {name!r}")
    if workers != "auto" and not (workers.isdecimal() and int(workers) > 0):
        raise ValueError(f"--workers must be auto or a number above 0; got {workers!r}")
    if wrong := [gpu for gpu in gpus if gpu < CPU]:
        raise ValueError(f"--gpu takes indices from 0, or -1 for the CPU; got {wrong[0]}")
    return {"local": LocalEngine, "ray": RayEngine}[name](gpus, None if workers == "auto" else int(workers))


def launch(command: Command, gpu: int, environment: Mapping[str, str]) -> subprocess.Popen:
    """Starts a command that is killed when the thread that calls this ends."""
    die_with_parent = _die_with(os.getpid()) if sys.platform == "linux" else None
    with open(command.output, "ab") as output:
        return subprocess.Popen(
            [*command.arguments, "--gpu", str(gpu)],
            cwd=command.folder,
            env={**environment, **command.variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )


def _die_with(parent: int):
    """Makes the function that a new process calls to be killed with its parent.

    Elsewhere than on Linux a command outlives a search that is killed; the next one waits for its end.
    """
    set_option, parent_death_signal = ctypes.CDLL(None).prctl, 1

    def die_with_parent() -> None:
        set_option(parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed just before
            os.kill(os.getpid(), signal.SIGKILL)

    return die_with_parent


def _run(command: Command, gpu: int, threads: Mapping[str, str]) -> int:
    """Is the task of Ray: runs a command to its end."""
    return launch(command, gpu, {**threads, **os.environ}).wait()


def _free_memory(gpu: int) -> int:
    """Measures the free bytes of a GPU; 0 if there is no room even to ask."""
    if gpu >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        there = f"this machine has GPUs 0 to {count - 1}" if count else "this machine has none; take --gpu -1"
        raise ValueError(f"no GPU left: --gpu {gpu} does not exist; {there}")
    try:
        return torch.cuda.mem_get_info(gpu)[0]
    except RuntimeError:
        return 0


def cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
