"""Every row of a batch is some process's, and no process believes it is alone when it is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from attnswap.pipelines.batch.share import Share, find
from attnswap.pipelines.errors import BadInput

REPORT = """
import os
from attnswap.pipelines.batch.share import find
from attnswap.pipelines.errors import BadInput
try:
    said = f"found {find(None, False, os.environ)}"
except BadInput as error:
    said = f"refused {error}"
os.write(1, (said + "\\n").encode())  # in one piece, as others write there, too
"""
# What `accelerate launch --cpu --num_processes 2` starts its one process with.
ONE_OF_TWO = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def ranks(rank: int, world: int, **more: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), **more}


def test_alone() -> None:
    assert find(None, False, {}) == Share(0, 1, False, "", None)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 5, 21])
def test_shards_make_every_row_once(rows: int, count: int) -> None:
    shares = [find(f"{index}/{count}", False, {}) for index in range(count)]
    parts = [share.of(range(rows)) for share in shares]
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_shard_has_a_journal_of_its_own() -> None:
    assert find("2/4", False, {}) == Share(2, 4, False, "2-of-4", None)


def test_one_shard_of_one_is_alone() -> None:
    assert find("0/1", False, {}) == Share()


@pytest.mark.parametrize(
    ("shard", "text"),
    [
        ("4/4", "--shard 4/4: shards are counted from 0: 0/4 to 3/4."),
        ("7/4", "--shard 7/4: shards are counted from 0: 0/4 to 3/4."),
        ("1/1", "--shard 1/1: shards are counted from 0: 0/1 is the only one."),
    ],
)
def test_shards_are_counted_from_nought(shard: str, text: str) -> None:
    with pytest.raises(BadInput, match=f"^{re.escape(text)}$"):
        find(shard, False, {})


@pytest.mark.parametrize("shard", ["", "1", "/", "1/", "/4", "a/4", "-1/4", "1/-4", "0/0", "1.0/4", "1/4/2", "٣/4"])
def test_what_is_no_shard(shard: str) -> None:
    with pytest.raises(BadInput, match="a shard is I/N, such as 0/4"):
        find(shard, False, {})


def test_a_rank_is_a_shard_on_its_own_device() -> None:
    environ = {**ranks(5, 8), "LOCAL_RANK": "1"}
    assert find(None, False, environ) == Share(5, 8, False, "5-of-8", 1)


def test_one_rank_of_one_is_alone() -> None:
    assert find(None, False, ranks(0, 1)) == Share()


def test_who_claims_may_make_any_row_and_has_a_journal_of_its_own() -> None:
    share = find(None, True, {})
    assert share.of("abc") == "abc"
    assert share.claim
    assert str(os.getpid()) in share.worker
    assert re.fullmatch(r"[A-Za-z0-9-]+", share.worker)
    assert share == find(None, True, {})


def test_ranks_can_claim() -> None:
    share = find(None, True, ranks(1, 2))
    assert share.of("abc") == "abc"
    assert share.local_rank == 1


def test_the_ways_to_divide_a_batch_exclude_each_other() -> None:
    with pytest.raises(BadInput, match="--shard and --claim"):
        find("0/2", True, {})
    with pytest.raises(BadInput, match=r"--shard 0/2 under a launcher that started 2 processes"):
        find("0/2", False, ranks(0, 2))


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"WORLD_SIZE": "2"}, "there are 2 processes"),
        ({"RANK": "1"}, "no WORLD_SIZE"),
        (ranks(2, 2), "RANK=2 and WORLD_SIZE=2; ranks are 0 to 1"),
        (ranks(1, 1), "RANK=1 and WORLD_SIZE=1"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
    ],
)
def test_ranks_that_cannot_be(environ: dict[str, str], text: str) -> None:
    with pytest.raises(BadInput) as refused:
        find(None, False, environ)
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("environ", "advice"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun … sh -c 'attnswap batch … --shard $SLURM_PROCID/$SLURM_STEP_NUM_TASKS'"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "--shard $OMPI_COMM_WORLD_RANK/$OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "4"}, "--shard $PMI_RANK/$PMI_SIZE"),
        ({"PMI_SIZE": "4", **ONE_OF_TWO}, "--shard $PMI_RANK/$PMI_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "4", **ranks(0, 1)}, "--claim"),
        (ONE_OF_TWO, "torchrun --nproc_per_node N -m attnswap.cli batch"),
    ],
)
def test_one_of_many_that_would_make_all_rows_is_refused(environ: dict[str, str], advice: str) -> None:
    with pytest.raises(BadInput) as refused:
        find(None, False, environ)
    assert advice in str(refused.value)
    assert "\n" not in str(refused.value)
    # What it advises is accepted.
    assert find("1/4", False, environ).worker == "1-of-4"
    assert find(None, True, environ).claim
    assert find("0/1", False, environ).worker == ""


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},  # a script of sbatch, outside of srun
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": ""},
        {"ACCELERATE_MIXED_PRECISION": "no"},  # accelerate launch --num_processes 1
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
        {"RANK": "0"},
    ],
)
def test_one_that_is_alone_is_not_refused(environ: dict[str, str]) -> None:
    assert find(None, False, environ) == Share()


def test_ranks_within_a_slurm_step_know_each_other() -> None:
    assert find(None, False, ranks(3, 8, SLURM_STEP_NUM_TASKS="4")).worker == "3-of-8"


def launch(tmp_path: Path, *command: str) -> list[str]:
    """What the processes of a launcher find, without what it says itself."""
    (tmp_path / "report.py").write_text(REPORT)
    unknown = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "ACCELERATE_", "SLURM_", "OMPI_", "PMI_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(unknown)}
    environ |= {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path / "report.py")],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return sorted(line for line in ran.stdout.splitlines() if line.startswith(("found", "refused")))


ACCELERATE = "accelerate.commands.launch"


def test_accelerate_that_starts_one_process_for_two_is_refused(tmp_path: Path) -> None:
    (said,) = launch(tmp_path, ACCELERATE, "--cpu", "--num_processes", "2", "--main_process_port", "29741")
    assert said.startswith("refused accelerate was asked for several processes")


def test_accelerate_with_one_process_is_alone(tmp_path: Path) -> None:
    assert launch(tmp_path, ACCELERATE, "--cpu", "--num_processes", "1") == [f"found {Share()}"]


@pytest.mark.parametrize(
    "command",
    [
        (ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "29742"),
        ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29743"),
    ],
)
def test_what_the_refusal_advises_gives_each_process_its_part(tmp_path: Path, command: tuple[str, ...]) -> None:
    shares = [Share(rank, 2, worker=f"{rank}-of-2", local_rank=rank) for rank in range(2)]
    assert launch(tmp_path, *command) == [f"found {share}" for share in shares]
