"""Which rows of a batch this process makes, and whether others are at it."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import BadInput

T = TypeVar("T")

# Launchers of many tasks that know nothing of each other, by the variables they count them with.
_TASKS = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)


@dataclass(frozen=True)
class Share:
    """A part of a batch.

    Attributes:
        index, count: It makes every `count`-th row from row `index` on, counted from 0.
        claim: It makes those of all rows that it can claim.
        worker: What its journal is called; "" for a batch without others.
        local_rank: Which of the machine's processes this is, where a launcher says so: it has that device.
    """

    index: int = 0
    count: int = 1
    claim: bool = False
    worker: str = ""
    local_rank: int | None = None

    def of(self, rows: Sequence[T]) -> Sequence[T]:
        """Strided, since rows that are alike in cost tend to stand together."""
        return rows[self.index :: self.count]


def find(shard: str | None, claim: bool, environ: Mapping[str, str]) -> Share:
    """This process's share, by its flags or by the ranks that torchrun and `accelerate launch` give.

    No process group is opened, so that no process ever waits for another.

    Args:
        shard: "I/N", counted from 0, as the ranks of launchers and most job arrays are.

    Raises:
        BadInput: `shard` is no such thing; or there are several processes and each would make all rows.
    """
    if shard is not None and claim:
        raise BadInput("--shard and --claim are two ways to divide a batch; take one.")
    rank, world = _ranks(environ)
    local_rank = _number(environ, "LOCAL_RANK") if world > 1 else None
    if shard is not None and world > 1:
        raise BadInput(
            f"--shard {shard} under a launcher that started {world} processes (WORLD_SIZE={world}): each would make "
            "that shard. Leave --shard out, and every process takes its own part."
        )
    if claim:
        return Share(claim=True, worker=_unique_name(), local_rank=local_rank)
    if shard is not None:
        rank, world = _parse(shard)
    elif world == 1:
        _refuse_tasks_that_do_not_know_each_other(environ)
    return Share(rank, world, worker=f"{rank}-of-{world}" if world > 1 else "", local_rank=local_rank)


def machine() -> str:
    """This machine, as its processes can know each other by number: host name, boot, and container."""
    parts = [re.sub(r"\s", "-", socket.gethostname())]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # not Linux
        pass
    return " ".join(parts)


def _parse(shard: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard.strip())
    if not match or int(match[2]) == 0:
        raise BadInput(f"--shard {shard!r}: a shard is I/N, such as 0/4 for the first of four.")
    index, count = int(match[1]), int(match[2])
    if index >= count:
        known = f"0/{count} to {count - 1}/{count}" if count > 1 else "0/1 is the only one"
        raise BadInput(f"--shard {shard}: shards are counted from 0: {known}.")
    return index, count


def _ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """The rank of this process and how many there are; (0, 1) where no launcher says so."""
    world = _number(environ, "WORLD_SIZE")
    rank = _number(environ, "RANK")
    if world is None:
        if rank:
            raise BadInput(f"The environment has RANK={rank}, but no WORLD_SIZE. Set both, as torchrun does, or none.")
        return 0, 1
    if rank is None and world == 1:
        return 0, 1
    if rank is None:
        raise BadInput(
            f"The environment says that there are {world} processes (WORLD_SIZE={world}), but not which one this is "
            "(RANK): each would make all rows. Start them by torchrun, or unset WORLD_SIZE."
        )
    if rank >= world:
        raise BadInput(f"The environment has RANK={rank} and WORLD_SIZE={world}; ranks are 0 to {world - 1}.")
    return rank, world


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or (name == "WORLD_SIZE" and int(text) == 0):
        raise BadInput(f"The environment has {name}={text!r}, which is no {name} that a launcher gives.")
    return int(text)


def _refuse_tasks_that_do_not_know_each_other(environ: Mapping[str, str]) -> None:
    """
    Raises:
        BadInput: this is one of several processes, or the only one of several that were asked for.
    """
    for launcher, size, rank in _TASKS:
        tasks = environ.get(size, "")
        if tasks.isdecimal() and int(tasks) > 1:
            # In quotes, since outside of them the shell that starts the tasks would fill in its own number.
            raise BadInput(
                f"{launcher} started {tasks} tasks ({size}={tasks}), and each would make all rows. Add --claim, or "
                f"give each its shard: {launcher} … sh -c 'attnswap batch … --shard ${rank}/${size}'. "
                "If this is the only one, say --shard 0/1."
            )
    # What `accelerate launch` sets for several processes where it then starts one: it leaves several on CPUs to MPI.
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ and "WORLD_SIZE" not in environ:
        raise BadInput(
            "accelerate was asked for several processes, but started one without a rank, as it does on CPUs. Start N "
            "by `torchrun --nproc_per_node N -m attnswap.cli batch …` or by `accelerate launch --multi_gpu "
            "--num_processes N -m attnswap.cli batch …`, or run `attnswap batch … --claim` in N shells. "
            "If one is what you want, say --shard 0/1."
        )


def _unique_name() -> str:
    """The machine and the number of the process; a few letters tell containers with equal host names apart."""
    name = machine()
    host = re.sub(r"[^A-Za-z0-9-]", "-", name.partition(" ")[0])[:60]
    return f"{host}-{os.getpid()}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
