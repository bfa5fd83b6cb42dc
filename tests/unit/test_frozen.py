"""Parameters that no optimizer holds come back from a vault or from a replica, and nobody trains on with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulated import ranks_together

RANKS = 2


def _rank(rank: int, directory: str) -> None:
    import torch
    from megatron.core import parallel_state

    from deadpool_megatron.megatron.comparison import Unequal
    from deadpool_megatron.megatron.frozen import _TRIES, Frozen, NotInVault
    from deadpool_megatron.vault import ConstantsWriter, Vault, constants_of

    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel()  # both ranks are replicas of one another
    model = torch.nn.Linear(64, 64)
    model.buffers = model.expert_parallel_buffers = []  # as of a `DistributedDataParallel` that trains none of them
    frozen = Frozen([model], 1 << 20)
    torch.nn.init.constant_(model.weight, 2.0)
    torch.nn.init.constant_(model.bias, 1.0)
    frozen.look()
    right = frozen.expected = frozen.digests
    vault = Vault("frozen", rank, directory)
    vault.allocate_own(constants_of(rank), frozen.plan.nbytes, 1)
    arena = vault.arena(constants_of(rank), "own")
    assert arena is not None
    frozen.use(ConstantsWriter(arena), b"")

    def others() -> None:
        torch.nn.init.zeros_(model.weight)
        frozen.look()
        assert frozen.digests != right

    frozen.keep()
    assert vault.checksum(constants_of(rank))
    others()
    if rank == 0:
        arena.slots[0].reopen(0)  # as where none has come yet
    frozen.synchronize()
    assert frozen.digests == right and bool((model.weight == 2.0).all()), "from the vault, and from the replica"
    if rank == 1:
        arena.slots[0].unique[100] ^= 1  # changed in memory; rank 0 never got any
    for _ in range(_TRIES):
        others()
        with pytest.raises(NotInVault):
            frozen.synchronize()
    others()
    with pytest.raises(Unequal):
        frozen.synchronize()
    torch.distributed.destroy_process_group()


def test_constants_that_the_own_vault_does_not_have_are_asked_for_again_in_the_next_epoch(tmp_path: Path) -> None:
    ranks_together(_rank, RANKS, tmp_path)
