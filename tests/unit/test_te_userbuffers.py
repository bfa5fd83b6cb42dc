"""Layers whose GEMMs communicate in emulated userbuffers give what the same layers give with collectives of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emulated import assert_close, ranks_together

RANKS, ROWS, HIDDEN, FFN = 2, 256, 128, 256
# By name: the settings of --tp-comm-overlap-cfg.
METHODS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rings": {name: {"method": "ring_exchange"} for name in ("fc1_dgrad", "fc2_fprop")},
    "pipelines": {"fc1_dgrad": {"method": "pipeline", "num_splits": 2}},
    "FP8 pipelines": {"fc2_fprop": {"method": "pipeline", "fp8_buf": True}},
}
CASES = (
    ("bf16", ("defaults", "rings", "pipelines")),
    ("current", ("defaults",)),
    ("mxfp8", ("defaults", "rings")),
    ("delayed", ("defaults", "FP8 pipelines")),
)
_OVERLAPS = {
    "fc1": ("ub_overlap_ag", "ub_overlap_rs_dgrad", "ub_bulk_dgrad", "ub_bulk_wgrad"),
    "fc2": ("ub_overlap_ag", "ub_overlap_rs"),
}


def _recipe(name: str) -> Any:
    from transformer_engine.common import recipe

    return {
        "bf16": lambda: None,
        "delayed": lambda: recipe.DelayedScaling(amax_history_len=2, amax_compute_algo="max"),
        "current": recipe.Float8CurrentScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }[name]()


def _layers(overlapped: bool, methods: str) -> list[Any]:
    """fc1, its input gathered among the ranks, and fc2, its output added up among them."""
    import torch
    import transformer_engine.pytorch as te

    group = torch.distributed.group.WORLD
    common = {"tp_group": group, "tp_size": RANKS, "sequence_parallel": True, "params_dtype": torch.bfloat16}

    def overlap(name: str) -> dict[str, Any]:
        if not overlapped:
            return {}
        flags = dict.fromkeys(_OVERLAPS[name], True)
        if "ub_overlap_rs_dgrad" in flags:
            flags["ub_overlap_rs_dgrad"] = "fc1_dgrad" in METHODS[methods]
        return {"ub_name": name, **flags}

    torch.manual_seed(3 + torch.distributed.get_rank())
    fc1 = te.LayerNormLinear(HIDDEN, FFN, bias=False, parallel_mode="column", **common, **overlap("fc1"))
    fc2 = te.Linear(FFN, HIDDEN, bias=False, parallel_mode="row", **common, **overlap("fc2"))
    return [fc1, fc2]


def _passes(layers: list[Any], recipe: str) -> list[Any]:
    """Outputs and gradients of two passes: delayed scaling has scales from the second one on."""
    import torch
    import transformer_engine.pytorch as te

    fc1, fc2 = layers
    torch.manual_seed(20 + torch.distributed.get_rank())
    found: list[Any] = []
    for _ in range(2):
        x = torch.randn(ROWS // RANKS, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        with te.autocast(enabled=recipe != "bf16", recipe=_recipe(recipe), amax_reduction_group=None):
            y = fc2(torch.nn.functional.gelu(fc1(x)))
        y.backward(torch.randn_like(y))
        found += [y.detach(), x.grad, *(p.grad.clone() for layer in layers for p in layer.parameters())]
        for layer in layers:
            layer.zero_grad()
    return found


def _buffers() -> None:
    """What the objects themselves say, refuse and do."""
    import torch
    import transformer_engine_torch as tex

    group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    helper = tex.CommOverlapHelper(group)
    ring = tex.CommOverlapP2P([4, 3], torch.bfloat16, helper, RANKS, tex.CommOverlapType.RS)
    pipe = tex.CommOverlap([4, 3], torch.uint8, helper, RANKS)
    assert ring.is_p2p_overlap() and not pipe.is_p2p_overlap()
    assert pipe.is_fp8_ubuf() and not ring.is_fp8_ubuf() and not ring.with_cublasmp()
    assert ring.get_buffer().shape == (6, 3), "what arrives is kept apart"
    pipe.copy_into_buffer(torch.full((2, 3), rank + 1, dtype=torch.uint8), local_chunk=True)
    tex.bulk_overlap_ag_with_external_gemm(pipe, *pipe.get_communication_stream())
    assert pipe.get_buffer()[:, 0].tolist() == [1, 1, 2, 2]
    assert pipe.get_buffer(local_chunk=True, shape=[3, 2]).unique().tolist() == [rank + 1]
    for wrong in (torch.zeros(2, 3), torch.zeros(1, 3, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match=r"^Tried to copy an invalid tensor"):
            pipe.copy_into_buffer(wrong, local_chunk=True)
    with pytest.raises(RuntimeError, match=r"^Invalid shape for a Userbuffers buffer"):
        pipe.get_buffer(shape=[4, 4])
    with pytest.raises(NotImplementedError, match="atomic"):
        tex.CommOverlap([4, 3], torch.uint8, helper, RANKS, atomic_gemm=True)


def _replayed() -> None:
    """A graph has the communication too: a replay gathers and adds up what is in its memory then."""
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.module import base

    rank = torch.distributed.get_rank()
    weight = torch.eye(4, dtype=torch.bfloat16)
    x, out = torch.ones(2, 4, dtype=torch.bfloat16), torch.empty(2, 4, dtype=torch.bfloat16)
    whole = torch.ones(4, 4, dtype=torch.bfloat16)
    te.initialize_ub([4, 4], RANKS, quantization_modes=[base.UserBufferQuantizationMode.NONE])
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine_torch import CommOverlapType

    gathers, adds = base.get_ub("fc1_fprop", False), base.get_ub("fc2_fprop", False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gathers.copy_into_buffer(x, local_chunk=True)
        gathered, *_ = general_gemm(weight, gathers.get_buffer(), ub=gathers, ub_type=CommOverlapType.AG)
        general_gemm(weight, whole, ub=adds, ub_type=CommOverlapType.RS, extra_output=out)
    graph.replay()
    for number in (2, 5):
        x.fill_(number + rank)
        whole.fill_(number + rank)
        graph.replay()
        assert gathered[:, 0].tolist() == [number, number, number + 1, number + 1]
        assert out[:, 0].tolist() == [2 * number + 1] * 2
    te.destroy_ub()


def _rank(rank: int, directory: str) -> None:
    import os

    from deadpool_megatron import emulation

    os.environ["DEADPOOL_EMULATED_CAPABILITY"] = "10.0"
    emulation.install()
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.module import base

    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=RANKS)
    _buffers()
    _replayed()
    for recipe, names in CASES:
        mode = base.UserBufferQuantizationMode
        modes = [mode.NONE if recipe == "bf16" else mode.FP8]
        want = _passes(_layers(False, "defaults"), recipe)
        for name in names:
            te.initialize_ub([ROWS, HIDDEN], RANKS, quantization_modes=modes, ub_cfgs=METHODS[name])
            got = _passes(_layers(True, name), recipe)
            te.destroy_ub()
            if name == "FP8 pipelines":
                assert any(not torch.equal(*each) for each in zip(got, want, strict=True))
            for place, (here, there) in enumerate(zip(got, want, strict=True)):
                if name == "FP8 pipelines":  # each rank's part is rounded before they are added up
                    assert_close(here, there, 0.1)
                else:
                    assert torch.equal(here, there), (recipe, name, place)

    torch.distributed.destroy_process_group()
    _on_a_spare_node(rank, directory)


def _on_a_spare_node(rank: int, directory: str) -> None:
    """A node makes its buffers alone, in a job whose other ranks take no part; and its ranks meet at every launch."""
    import os

    import torch
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex
    from megatron.core import parallel_state
    from transformer_engine.pytorch.module import base
    from transformer_engine.pytorch.ops.fused import userbuffers_backward_linear

    from deadpool_megatron.megatron.muster import Muster
    from deadpool_megatron.megatron.userbuffers import Userbuffers

    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS)
    here = RANKS + rank  # of the second node of two
    torch.distributed.init_process_group("fake", rank=here, world_size=2 * RANKS)
    parallel_state.initialize_model_parallel(RANKS, create_gloo_process_groups=False)
    modes = [base.UserBufferQuantizationMode.NONE]
    buffers = Userbuffers(
        lambda: te.initialize_ub([4, 4], RANKS, quantization_modes=modes, bootstrap_backend="nccl"),
        lambda: torch.distributed.FileStore(f"{directory}/node", RANKS),
        30.0,
    )
    with open(f"{directory}/muster", "a+b") as file:
        file.truncate(4096)
        muster = Muster(os.dup(file.fileno()), here, RANKS, lambda: 7, lambda: None)
    buffers.meet_before_launches(lambda: muster)
    buffers.promise()
    te.Linear(4, 4, parallel_mode="row", sequence_parallel=True, tp_size=RANKS, ub_overlap_rs=True, ub_name="proj")
    buffers.begin(muster, 7)
    assert base.torch is torch
    assert muster.bereft([2 * RANKS - 1 - rank]) and not muster.bereft([0])
    gathers = base.get_ub("qkv_fprop", False)
    for number in (1, 2):
        gathers.copy_into_buffer(torch.full((2, 4), here * number, dtype=torch.bfloat16), local_chunk=True)
        te.module.linear.general_gemm(
            torch.eye(4).bfloat16(), gathers.get_buffer(), ub=gathers, ub_type=tex.CommOverlapType.AG
        )
        assert gathers.get_buffer()[:, 0].tolist() == [2 * number, 2 * number, 3 * number, 3 * number]
    assert muster._times == 3, "made them, and launched twice"
    bulk = base.get_ub("proj_wgrad", False)
    for launch in (tex, userbuffers_backward_linear):
        launch.bulk_overlap_ag_with_external_gemm(bulk, *bulk.get_communication_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pass
    graph.replay()
    assert muster._times == 6
    te.module.linear.general_gemm(torch.eye(4), torch.eye(4))
    assert muster._times == 6, "one that waits for nobody"
    buffers.begin(muster, 7)
    assert muster._times == 6, "a survivor keeps them"


def test_layers_give_the_same_numbers_with_userbuffers_and_a_node_makes_them_alone(tmp_path: Path) -> None:
    ranks_together(_rank, RANKS, tmp_path)
