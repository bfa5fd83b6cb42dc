"""The adapter of the running megatron-core is chosen by its version, and one that cannot work is told in one line."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from deadpool_megatron.compat import SUPPORTED, UserError

pytestmark = pytest.mark.versions(megatron=True)


@pytest.fixture(scope="module")
def adapters() -> object:
    from deadpool_megatron.megatron import adapters

    return adapters


def test_there_is_one_adapter_for_every_supported_line(adapters: SimpleNamespace) -> None:
    assert tuple(a.line for a in adapters.ADAPTERS) == SUPPORTED


def test_the_running_megatron_gets_the_adapter_of_its_line_and_has_its_seams(adapters: SimpleNamespace) -> None:
    import megatron.core

    version = megatron.core.__version__
    adapter = adapters.current()
    assert version.startswith(adapter.line + ".")
    # scripts/test.sh runs this on other lines too, and says which it means.
    assert version.startswith(os.environ.get("DEADPOOL_TEST_MEGATRON", ""))
    adapter.check_seams(version)


def test_a_build_without_one_of_our_seams_is_told_what_it_lacks(
    adapters: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_SEAMS", {"megatron.core.rerun_state_machine": ("RerunStop",)})
    with pytest.raises(UserError, match=r"has no megatron\.core\.rerun_state_machine\.RerunStop"):
        adapters.current().check_seams("0.19.9")
    from megatron.training import training

    from deadpool_megatron.megatron.lm import MegatronLM

    host = MegatronLM()
    host.upstream = "core_v0.19.x"
    with pytest.raises(UserError, match=r"megatron\.training\.training has no train_stop, .*: use core_v0\.19\.x"):
        host.replace(training, "train_stop", lambda call: call())


def test_what_survivors_have_learned_is_forgotten_and_nothing_is_invented(adapters: SimpleNamespace) -> None:
    optimizer = SimpleNamespace(_has_grad_norm_group_cache={"all": True})
    adapters.ADAPTERS[1].forget_learned(optimizer)
    assert optimizer._has_grad_norm_group_cache is None
    older = SimpleNamespace()
    adapters.ADAPTERS[1].forget_learned(older)
    assert vars(older) == {}
