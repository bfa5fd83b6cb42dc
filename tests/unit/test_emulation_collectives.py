"""Where Gloo does otherwise than NCCL, and Megatron and Transformer Engine count on NCCL: two emulated processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deadpool_megatron import emulation

pytestmark = pytest.mark.versions(torch=True)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, mp_context=context, initializer=emulation.install) as both:
        yield both


def _as_rank(check: Callable[[int], None], rank: int, meeting: str) -> None:
    dist.init_process_group("nccl", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        check(rank)
    finally:
        dist.destroy_process_group()


def both(pool: ProcessPoolExecutor, check: Callable[[int], None], directory: Path) -> None:
    """Run it as both ranks of a job."""
    for done in [pool.submit(_as_rank, check, rank, str(directory / "meeting")) for rank in (0, 1)]:
        done.result()


def _gathers_several_types(rank: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)  # as numbers BF16 cannot hold them all
    mine = [codes.roll(rank), torch.full((3,), 0.1 + rank).bfloat16(), torch.tensor([1.0 + 2**-20 * rank])]
    all_of = [torch.empty(2 * each.numel(), dtype=each.dtype) for each in mine]
    with dist._coalescing_manager(dist.group.WORLD, async_ops=True) as work:
        for out, each in zip(all_of, mine, strict=True):
            dist.all_gather_into_tensor(out, each)
    work.wait()
    assert torch.equal(all_of[0], torch.cat((codes, codes.roll(1))))
    assert torch.equal(all_of[1], torch.tensor([0.1] * 3 + [1.1] * 3).bfloat16())
    assert torch.equal(all_of[2], torch.tensor([1.0, 1.0 + 2**-20]))


def test_a_coalesced_all_gather_of_several_types_keeps_each(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    both(pool, _gathers_several_types, tmp_path)


def _waits_twice(rank: int) -> None:
    given, got = torch.full((4,), float(rank)), torch.empty(4)
    works = [dist.isend(given, 1 - rank), dist.irecv(got, 1 - rank)]
    for work in works * 2:
        work.wait()
    assert torch.equal(got, torch.full((4,), float(1 - rank)))


def test_a_second_wait_for_a_message_returns(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    both(pool, _waits_twice, tmp_path)


def _coalesces_on_a_device(rank: int) -> None:
    out = [torch.empty(4), torch.empty(2)]
    with dist._coalescing_manager(dist.group.WORLD, device=torch.device("cuda", 0), async_ops=True) as work:
        for each in out:
            dist.all_gather_into_tensor(each, torch.full((each.numel() // 2,), float(rank)))
    work.wait()
    assert out[0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert out[1].tolist() == [0.0, 1.0]


def test_calls_are_coalesced_when_a_device_is_named(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    both(pool, _coalesces_on_a_device, tmp_path)
