"""What a broken training step leaves behind in Megatron's objects, and how it is put right before train() runs again.

Also clears what survivors have learned lazily and a fresh spare has not: it would make their sequences of collectives
differ, and the job hang (`Adapter.learned`, bucket groups' first batch).
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Final

import torch
from megatron.core import rerun_state_machine, utils

from deadpool_megatron.megatron.adapters import current
from deadpool_megatron.megatron.frozen import Frozen
from deadpool_megatron.megatron.host import Host
from deadpool_megatron.megatron.low_precision import forget_broken_step
from deadpool_megatron.megatron.optimizer_state import derive_parameters, members
from deadpool_megatron.megatron.sums import clear_sums
from deadpool_megatron.megatron.unique_state import UniqueState

_CALLERS: Final = ("persistent_caller", "_warmup_persistent_caller")  # of a queue of nvidia-resiliency-ext
_WRITERS: Final = (
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async",
)


def reset_after_abort(host: Host, model: list[Any], optimizer: Any) -> None:
    """Drop handles, gradients and half-done bookkeeping of the step that broke. No communication, no allocation."""
    adapter, config, args = current(), utils.get_model_config(model[0]), host.args
    for timer in host.timers._timers.values():
        timer._started = False
    machine = rerun_state_machine.get_rerun_state_machine()
    machine.state = rerun_state_machine.RerunState.NOT_RUNNING_YET
    machine.data_iterator_checkpoints = None
    # evaluate() switches it off while it runs, and a machine that is off leaves out an all-reduce of each iteration.
    machine.mode = rerun_state_machine.RerunMode(args["rerun_mode"])
    for one in _all_optimizers(optimizer):
        adapter.forget_learned(one)
        # train() wraps it again where it wraps it at all.
        with contextlib.suppress(KeyError):
            del one.__dict__["step"]
    clear_sums()
    forget_write_results()
    host.unwind(config)
    if args["log_straggler"]:
        _reset_straggler_detector(args["disable_straggler_on_startup"])
    _end_profile(bool(args.get("use_pytorch_profiler")))
    _forget_offloading()
    _forget_paged_stash(model)
    forget_broken_step(model)
    for chunk in model:
        for group in _bucket_groups(chunk):
            adapter.refresh_bucket_group(group)
        chunk.force_all_reduce = False
        for parameter in chunk.parameters():
            parameter.grad = None
    # train() disables the forward pre-hooks for its first iteration and asserts that they were there.
    if model[0].use_forward_hook and not model[0].remove_forward_pre_hook_handles:
        for chunk in model:
            chunk.enable_forward_pre_hook()


def _reset_straggler_detector(off: bool) -> None:
    """Put it where ``--log-straggler`` begins. Somebody may have switched it at its port since, of which a spare knows
    nothing: it would take part in other collectives than the survivors. Source: upstream's _check_toggle."""
    detector = utils.__straggler__  # the only one there is: to call the class makes it anew
    if detector._off == off:
        return
    detector._off = off
    detector.start = detector.null_method if off else detector.start_method
    detector.stop = detector.null_method if off else detector.stop_method
    if detector.rank == 0:
        state = "OFF" if off else "ON"
        print(
            f"deadpool: the straggler detector is {state} again, as --log-straggler began; switch it anew", flush=True
        )


def _end_profile(of_torch: bool) -> None:
    """Of ``--profile``: the next ``train`` knows nothing of what this one has begun. Torch does not begin ranges for
    nsys twice, and its own profiler would go on to fill the host's memory until a new one begins to record."""
    kinds = torch._C._profiler.ActiveProfilerType
    begun = torch._C._autograd._profiler_type()
    if begun == kinds.NVTX or (begun == kinds.KINETO and of_torch):
        torch.autograd.profiler.emit_nvtx().__exit__(None, None, None)  # of either kind


def _forget_offloading() -> None:
    """Of ``--fine-grained-activation-offloading``: what the broken step has on the host, and what this process has
    learned in its first iteration, at the end of which all ranks gather a table: a spare would do so alone."""
    module = sys.modules.get("megatron.core.pipeline_parallel.fine_grained_activation_offload")
    if module is not None:
        module.PipelineOffloadManager.OFFLOAD_MGR = None


def _forget_paged_stash(model: list[Any]) -> None:
    """Of ``--moe-expert-rank-capacity-factor``: that an iteration had to be done again without it. Of
    ``--moe-paged-stash``: what is stashed, and the schedule that this process has recorded in its first iterations."""
    module: Any = sys.modules.get("megatron.core.transformer.moe.paged_stash")
    manager = None if module is None else module.PagedStashManager.STASH_MGR
    if manager is None:
        return
    for chunk in model:
        for layer in chunk.modules():
            if manager.iteration and hasattr(layer, "config"):
                layer.config.moe_paged_stash = True
            if (dispatcher := getattr(layer, "token_dispatcher", None)) is not None:
                dispatcher.reset_over_budget()
                budget = dispatcher.config.moe_expert_rank_capacity_factor
                dispatcher._comm_manager.moe_expert_rank_capacity_factor = budget
    module.PagedStashManager.STASH_MGR = None


def _bucket_groups(chunk: Any) -> list[Any]:
    return [*getattr(chunk, "bucket_groups", ()), *getattr(chunk, "expert_parallel_bucket_groups", ())]


def _all_optimizers(optimizer: Any) -> list[Any]:
    """The optimizer and those it consists of, at any depth."""
    return [optimizer, *(each for one in getattr(optimizer, "chained_optimizers", ()) for each in _all_optimizers(one))]


def synchronize_parameters(model: list[Any], optimizer: Any, unique: UniqueState, frozen: Frozen) -> None:
    """Bring back what others hold: replicated state from its owners, the model's parameters, those that are frozen.

    Collective over every data-parallel group: each rank of the job calls it. Raises Unequal (`Frozen`). Source:
    upstream's DistributedOptimizer._copy_main_params_to_model_params, DistributedDataParallel.start_param_sync and
    LayerWiseDistributedOptimizer.step_with_ready_grads.
    """
    unique.gather()
    derive_parameters(optimizer)
    reused = model[0].ddp_config.reuse_grad_buf_for_mxfp8_param_ag
    if reused:
        # Main parameters go through the gradients' buffer, in 16 bits, and become MXFP8 there: another way, other bits.
        for chunk in model:
            chunk.zero_grad_buffer()
    for member in members(optimizer):
        if reused and hasattr(member.optimizer, "_copy_main_params_to_param_buffer"):
            member.optimizer._copy_main_params_to_param_buffer()
        elif hasattr(member.optimizer, "_copy_main_params_to_model_params"):
            member.optimizer._copy_main_params_to_model_params()
    if model[0].ddp_config.use_distributed_optimizer:
        for chunk in model:
            chunk.start_param_sync(force_sync=True)
            for group in _bucket_groups(chunk):
                group.param_gather_handle = None
                group.param_gather_dispatched = False
    else:
        for one in _all_optimizers(optimizer):
            if hasattr(one, "allgather_params"):  # layer-wise, each parameter of one owner
                one.allgather_params()
    frozen.synchronize()
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def end_unfinished_saves(queue: Any, rank: int) -> None:
    """End asynchronous saves (``--async-save``) that are not finalized, and their queue. No communication.

    A process beside each rank writes one, and collectives finalize it, ranks counting their saves. A rank that has died
    takes its part along, and the spare in its place has counted nothing, so all begin to count anew. The writers are
    ended with SIGKILL: upstream's ``latest_checkpointed_iteration.txt`` names no save that is not finalized.
    """
    if queue is None:
        return
    dropped = list(queue.async_calls)
    for caller in (*(call.async_caller for call in dropped), *(getattr(queue, name, None) for name in _CALLERS)):
        _kill(caller)
    for call in dropped:
        call.async_caller.close(abort=True)
    queue.async_calls.clear()
    queue.close(abort=True)
    if dropped:
        print(
            f"deadpool: rank {rank}: {len(dropped)} asynchronous checkpoint(s) were being written when the node was "
            "lost, and are dropped; the state after the next iteration is saved in their place",
            file=sys.stderr,
            flush=True,
        )


def _kill(caller: Any) -> None:
    """End the process of a persistent caller of nvidia-resiliency-ext, and wait for nothing: its own ``close`` waits
    half a minute and then for ever, and who is in its step for longer than ``--deadpool-abort-deadline`` is lost.

    Its queues first, as there: what they hold of the device is given back before the other end is gone.
    """
    if getattr(caller, "process", None) is None or not hasattr(caller, "comp_q"):  # megatron.core's kills, and goes on
        return
    for queue in (caller.queue, caller.preload_q, caller.comp_q):
        queue.cancel_join_thread()
        queue.close()
    caller.process.kill()
    caller.process = None


def forget_write_results() -> None:
    """Let what was written into a checkpoint that broke off not be taken for what is written into the next one.

    Writers of either kind of strategy, within this process (checkpoints that wait) or beside it, give what they wrote
    to one queue a process, and each save takes the oldest. A new queue, since a writer that was ended may still be
    putting something into this one; of the same server, since another one takes seconds to start.
    """
    for name in _WRITERS:
        module: Any = sys.modules.get(name)
        queue = getattr(module, "_results_queue", None)
        if queue is not None:
            module._results_queue = None  # where the server is gone the next save starts one
            with contextlib.suppress(OSError, EOFError):
                module._results_queue = queue._manager.Queue()


def forget_strategies(context: dict[str, Any]) -> None:
    """Drop what earlier saves have cached: ranks with and without a cache do different collectives (upstream's
    ``--ckpt-assume-constant-structure``), and a spare has none."""
    for name in ("save_strategy", "load_strategy", "local_checkpoint_cache"):
        context.pop(name, None)
