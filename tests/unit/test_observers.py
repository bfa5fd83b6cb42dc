"""What observes an iteration by hooks or profilers can begin again after that iteration broke off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emulated import emulated_process, in_emulation  # noqa: F401


@in_emulation
def _the_loggers_of_upstream(directory: Path) -> None:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training import activation_logging, dgrad_logging

    from deadpool_megatron.megatron.lm import MegatronLM

    model = [torch.nn.Sequential(torch.nn.Linear(2, 2))]
    config = TransformerConfig(num_layers=1, hidden_size=2, num_attention_heads=1)
    begin = (
        activation_logging.enable_activation_logging,
        activation_logging.enable_tokens_per_expert_logging,
        dgrad_logging.enable_dgrad_logging,
    )

    def hooks() -> list[int]:
        return [len(vars(m)[name]) for m in model[0].modules() for name in ("_forward_hooks", "_backward_hooks")]

    before = hooks()
    MegatronLM().unwind(config)  # as in a job that has none of the flags
    for _ in range(2):
        for enable in begin:
            enable(model, str(directory))
        model[0](torch.ones(1, 2)).sum().backward()  # and the iteration breaks off
        assert hooks() != before
        assert activation_logging._LOGGER._activations_state_dict and dgrad_logging._LOGGER._dgrads_state_dict
        MegatronLM().unwind(config)
        assert hooks() == before and activation_logging._LOGGER is None and dgrad_logging._LOGGER is None


def test_activations_and_gradients_of_a_broken_iteration_are_dropped_and_recorded_anew(tmp_path: Path) -> None:
    _the_loggers_of_upstream(tmp_path)


@in_emulation
def test_a_profile_that_broke_off_ends_and_can_begin_again() -> None:
    import torch

    from deadpool_megatron.megatron.reset import _end_profile

    def kind() -> Any:
        return torch._C._autograd._profiler_type()

    def begin_torchs() -> torch.profiler.profile:
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        profile.start()
        return profile

    kinds = torch._C._profiler.ActiveProfilerType
    _end_profile(True)
    for _ in range(2):
        torch.autograd.profiler.emit_nvtx().__enter__()  # train() keeps it in a local variable
        assert kind() == kinds.NVTX
        _end_profile(False)
        assert kind() == kinds.NONE
        begin_torchs()
        assert kind() == kinds.KINETO
        _end_profile(True)
        assert kind() == kinds.NONE
    own = begin_torchs()  # of the script, around all of training
    _end_profile(False)
    assert kind() == kinds.KINETO
    own.stop()
