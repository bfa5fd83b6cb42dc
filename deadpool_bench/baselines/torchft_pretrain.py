"""``torchft_pretrain.py OPTIONS SCRIPT [ARGS]``: one replica group of a data-parallel torchft job, of one process.

For `deadpool bench recovery --torchft`. SCRIPT is the same Megatron script, with the same arguments: it builds model,
data and optimizer and runs Megatron's own training loop, in a world of one process. Between the backward pass and the
optimizer's step torchft's `Manager` averages the gradients over the replicas and decides whether the step counts, as
its `OptimizerWrapper` does. ``FIXED_WITH_SPARES``: the spare replicas are members of the quorum, receive all averaged
gradients and step their optimizer, so that they are as warm as can be, but compute nothing until they are needed.
Where all train at the start (``DYNAMIC``) as many go on as there are, and one that comes later gets the others' state.

All replicas draw the same global batch, and each that takes part computes its part of it. A replica therefore waits for
the quorum before its forward pass; what torchft could hide there is less than one iteration.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

ROWS: Final = "replica-{}.jsonl"  # one JSON object for each attempt at an iteration
READY: Final = "replica-{}.ready"
_START_S: Final = 600.0
_HOST: Final = "127.0.0.1"
# One process shards nothing, and torchft averages the gradients: a plain optimizer, whose state it can hand over.
_SHARDING: Final = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")


def without_sharding(arguments: Sequence[str]) -> list[str]:
    """Megatron's arguments without those that shard or overlap over data-parallel ranks of Megatron's own."""
    return [a for a in arguments if a not in _SHARDING]


def replica_arguments(text: Sequence[str]) -> argparse.Namespace:
    """Options of a replica, before the script and its arguments."""
    parser = argparse.ArgumentParser("torchft_pretrain.py", allow_abbrev=False)
    parser.add_argument("--replica", type=int, required=True, help="number of this replica group")
    parser.add_argument("--replicas", type=int, required=True, help="replica groups at the start, spares included")
    parser.add_argument("--active", type=int, required=True, help="replica groups that train at the start")
    parser.add_argument("--lighthouse", required=True, metavar="URL", help="address of torchft's lighthouse")
    parser.add_argument("--gloo-timeout", type=int, required=True, metavar="S", help="seconds an operation may take")
    parser.add_argument("--directory", type=Path, required=True, help="where the rows go")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args(text)


class Replica:
    """One replica group. Its `train_step` stands in for Megatron's.

    Raises (from `train_step`): ValueError when the global batch cannot be divided among the replicas that train;
    TimeoutError when other replicas do not start; whatever torchft's Manager raises.
    """

    def __init__(self, options: argparse.Namespace, megatron_step: Callable[..., Any]) -> None:
        self._options = options
        self._megatron_step = megatron_step
        self._spares = options.replicas > options.active
        self._manager: Any = None
        self._group: Any = None
        self._drawn = 0
        self._row: dict[str, Any] = {}
        self._rows = open(options.directory / ROWS.format(options.replica), "w", buffering=1)  # noqa: SIM115

    def train_step(
        self,
        forward_step: Any,
        data: Iterator[Any],
        model: list[Any],
        optimizer: Any,
        scheduler: Any,
        config: Any,
        forward_backward: Callable[..., Any],
        **more: Any,
    ) -> Any:
        """Megatron's step, with torchft between its backward pass and its optimizer."""

        def until_committed(*, data_iterator: Iterator[Any], num_microbatches: int, **rest: Any) -> Any:
            rest["model"] = model
            if self._manager is None:
                first = [next(data_iterator) for _ in range(num_microbatches)]
                self._drawn = 1
                # Everything is allocated and called once before the clock matters, in the spares as well.
                forward_backward(data_iterator=iter(first[:1]), num_microbatches=1, **rest)
                self._start(model, optimizer, scheduler)
                self._batch = first
            return self._attempts(forward_backward, data_iterator, num_microbatches, rest)

        done = self._megatron_step(forward_step, data, model, optimizer, scheduler, config, until_committed, **more)
        self._write(committed=True)
        return done

    def _attempts(self, forward_backward: Callable[..., Any], data: Iterator[Any], count: int, rest: Any) -> list[Any]:
        """One iteration until torchft commits it; what Megatron's schedule returned, nothing in a spare."""
        manager = self._manager
        while True:
            begun = time.time()
            manager.start_quorum()
            place = manager.participating_rank()
            active = self._options.active if self._spares else manager.num_participants()
            if count % active:
                raise ValueError(f"{count} microbatches cannot be divided among {active} replicas")
            part = count // active
            self._row = {
                "begun": begun,
                "quorum": time.time(),
                "step": manager.current_step(),
                "place": place,
                "participants": manager.num_participants(),
                "replicas": self._group.size(),
            }
            while self._drawn <= manager.current_step():  # more than one where others went on without this replica
                self._batch = [next(data) for _ in range(count)]
                self._drawn += 1
            for chunk in rest["model"]:
                chunk.zero_grad_buffer()
            losses: list[Any] = []
            if place is not None:
                mine = iter(self._batch[place * part : (place + 1) * part])
                losses = forward_backward(data_iterator=mine, num_microbatches=part, **rest)
            for chunk in rest["model"]:
                for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                    manager.allreduce(buffer.grad_data).wait()
            if manager.should_commit():
                return losses
            self._write(committed=False)

    def _write(self, committed: bool) -> None:
        row = {"t": time.time(), "replica": self._options.replica, "committed": committed, **self._row}
        self._rows.write(json.dumps(row) + "\n")

    def _start(self, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        """Make the Manager; returns when those of all replicas are there, so that the first quorum has everybody."""
        from torch.distributed import TCPStore
        from torchft import Manager, ProcessGroupGloo
        from torchft.manager import WorldSizeMode

        def state() -> dict[str, Any]:
            chunks = [chunk.state_dict() for chunk in model]
            return {"model": chunks, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}

        def load(state: dict[str, Any]) -> None:
            for chunk, content in zip(model, state["model"], strict=True):
                chunk.load_state_dict(content)
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])

        options = self._options
        self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        self._group = ProcessGroupGloo(timeout=timedelta(seconds=options.gloo_timeout))
        self._manager = Manager(
            pg=self._group,
            load_state_dict=load,
            state_dict=state,
            min_replica_size=options.active if self._spares else 1,
            world_size_mode=WorldSizeMode.FIXED_WITH_SPARES if self._spares else WorldSizeMode.DYNAMIC,
            rank=0,
            world_size=1,
            store_addr=_HOST,
            store_port=self._store.port,
            lighthouse_addr=options.lighthouse,
            replica_id=f"replica-{options.replica}",
            hostname=_HOST,
            init_sync=False,  # torchft's advice where all start from the same seed, as Megatron does
        )
        (options.directory / READY.format(options.replica)).touch()
        end = time.monotonic() + _START_S
        while len(list(options.directory.glob(READY.format("*")))) < options.replicas:
            if time.monotonic() > end:
                raise TimeoutError(f"not all of {options.replicas} replicas started within {_START_S:g} s")
            time.sleep(0.05)


def main() -> None:
    """Put torchft in its place, then run the script as ``python SCRIPT`` would, alone in its world."""
    options = replica_arguments(sys.argv[1:])
    sys.argv = [options.script, *without_sharding(options.arguments)]
    sys.path[0] = str(Path(options.script).resolve().parent)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone | {"MASTER_ADDR": _HOST, "MASTER_PORT": "0"})
    import torch
    from megatron.training import training

    from deadpool_megatron.emulation import is_installed

    if is_installed():  # torchft uses real streams, which are not emulated, wherever this says that there are some
        torch.accelerator.is_available = lambda: False
    training.train_step = Replica(options, training.train_step).train_step
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
