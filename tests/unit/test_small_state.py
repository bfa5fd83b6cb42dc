"""Buffers of modules come back with their dtype and shape, whatever Megatron has made of them meanwhile; a spare looks
at its results as the others do."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor


def _buffers_come_back() -> None:
    from deadpool_megatron import emulation

    emulation.install()
    import torch

    from deadpool_megatron.megatron.small_state import _Staged
    from deadpool_megatron.snapshot import decode, encode

    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("same", torch.arange(4.0, dtype=torch.float64, device="cuda"))
            self.register_buffer("bias", torch.zeros(4, dtype=torch.bfloat16, device="cuda"))
            self.register_buffer("late", None)

    def fresh() -> tuple[Router, _Staged]:
        router = Router()
        return router, _Staged([router], [])

    trained, staged = fresh()
    before = staged.take({})
    trained.bias.data = torch.tensor([0.001, 1.001, 2.001, 3.001], device="cuda")  # as experts' bias becomes float32
    trained.late = torch.ones(2, device="cuda")
    trained.same += 1
    log, loose = staged.take({})
    carried = decode(encode({"log": log, "loose": loose}))
    assert sorted(carried["loose"]) == ["small.chunk0..bias", "small.chunk0..late"]

    spare, other = fresh()
    for mine, theirs in zip(other._copies, staged._copies, strict=True):
        mine.copy_(theirs)  # what travels with the shard
    other.put_back(carried["log"], carried["loose"])
    for name, buffer in trained.named_buffers():
        back = dict(spare.named_buffers())[name]
        assert back.dtype is buffer.dtype and torch.equal(back, buffer), name

    # And a survivor goes back to a generation in which it was otherwise.
    early = fresh()[1]._copies
    for mine, first in zip(staged._copies, early, strict=True):
        mine.copy_(first)
    staged.put_back(*before)
    assert trained.bias.dtype is torch.bfloat16 and trained.late is None and trained.same[0] == 0


def test_a_buffer_of_another_dtype_than_at_the_begin_or_none_then_comes_back_exactly() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_buffers_come_back).result()


def _a_spare_looks_at_its_first_result() -> None:
    from deadpool_megatron import emulation

    emulation.install()
    import torch
    from megatron.core import rerun_state_machine as rerun

    from deadpool_megatron.megatron.small_state import _put_rerun, _rerun, unlike
    from deadpool_megatron.snapshot import decode, encode

    def fresh() -> rerun.RerunStateMachine:
        rerun.destroy_rerun_state_machine()
        rerun.initialize_rerun_state_machine(mode=rerun.RerunMode.VALIDATE_RESULTS)
        return rerun.get_rerun_state_machine()

    def asks_for_a_rerun(machine: rerun.RerunStateMachine) -> bool:
        assert machine.should_run_forward_backward(None)
        machine.validate_result(torch.tensor(float("nan")), torch.isnan, "loss")
        return bool(machine.rerun_requested)

    trained = fresh()
    assert trained.should_run_forward_backward(None)
    trained.state = rerun.RerunState.NOT_RUNNING_YET  # its iteration has ended well
    trained.should_checkpoint_and_exit()
    carried = encode({"rerun": _rerun()})
    spare = fresh()
    assert unlike(carried, encode({"rerun": _rerun()})), "what it has learned tells it from a new one"
    _put_rerun(decode(carried)["rerun"])
    assert not unlike(carried, encode({"rerun": _rerun()}))
    assert asks_for_a_rerun(spare)

    older = decode(carried)["rerun"]
    del older["first_iteration_complete"]
    spare = fresh()
    _put_rerun(older)
    assert spare.current_iteration == trained.current_iteration
    assert not unlike(encode({"rerun": older}), encode({"rerun": _rerun()})), "of a version that did not carry it"
    assert not asks_for_a_rerun(spare)


def test_a_spare_looks_at_the_results_of_its_first_iteration_as_survivors_do() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_a_spare_looks_at_its_first_result).result()
