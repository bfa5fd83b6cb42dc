"""What a broken iteration leaves in Transformer Engine is dropped, and what is state is carried, in all its layouts."""

from __future__ import annotations

import queue
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from deadpool_megatron.megatron import low_precision as lp


class _Old:
    """As up to Transformer Engine 2.14: fields of the class, the flag in capitals, a method of the other name."""

    IS_FIRST_FP8_MODULE = True

    def __init__(self) -> None:
        self.fp8_tensors_recompute_buffer = ["scales of a pass that has no backward"]

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        raise AssertionError("it changes what it tells")


def _new() -> SimpleNamespace:
    state = SimpleNamespace(is_first_fp8_module=True, fp8_tensors_recompute_buffer=["scales"])
    return SimpleNamespace(quantization_state=state)


@pytest.fixture(params=["old", "new"])
def manager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    manager = _Old() if request.param == "old" else _new()
    recompute = SimpleNamespace(_is_first_fp8_module=[True, True])
    modules = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.fp8": {"FP8GlobalStateManager": manager},
        "transformer_engine.pytorch.distributed": {"activation_recompute_forward": recompute},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    manager.recompute = recompute
    return manager


def test_the_flag_of_the_first_module_is_carried(manager: Any) -> None:
    assert lp.first_module() is True
    lp.put_first_module(False)
    assert lp.first_module() is False
    lp.put_first_module(None)  # the state of a job without Transformer Engine
    assert lp.first_module() is False


def test_what_a_broken_step_put_aside_is_dropped(manager: Any) -> None:
    waiting: queue.Queue[str] = queue.Queue()
    waiting.put("a weight gradient of a microbatch that is begun again")
    module = torch.nn.Linear(2, 2)
    module.fp8_meta = {"global_fp8_buffer_pos_fwd_recompute": 3, "num_gemms": 1}
    module.wgrad_store = SimpleNamespace(context=waiting)
    plain = torch.nn.Linear(2, 2)
    plain.wgrad_store = SimpleNamespace(context=None)
    lp.forget_broken_step([torch.nn.Sequential(module, plain)])
    state = getattr(manager, "quantization_state", manager)
    assert manager.recompute._is_first_fp8_module == [] and state.fp8_tensors_recompute_buffer == []
    assert module.fp8_meta == {"num_gemms": 1}
    assert waiting.empty()


def test_the_order_in_which_amaxes_are_reduced_is_known_or_refused(manager: Any) -> None:
    from deadpool_megatron.compat import UserError

    place = "buffer_index_and_autocast_key"
    late, early, never = (
        SimpleNamespace(fp8_meta=meta) for meta in ({place: [1, "k", 1, "k"]}, {place: [0, "k", 0, "k"]}, {})
    )
    scaled = [("0.late", late), ("0.early", early), ("0.never", never)]
    state = getattr(manager, "quantization_state", manager)
    state.global_amax_buffer = {"forward_k": [1, 2], "backward_k": [1, 2]}
    assert lp.registered(scaled) == ["0.early", "0.late"]
    state.global_amax_buffer["forward_k"].append(3)  # of a module that is not among them
    with pytest.raises(UserError, match="use another --fp8-recipe"):
        lp.registered(scaled)


def test_without_transformer_engine_there_is_nothing_to_do() -> None:
    assert "transformer_engine.pytorch" not in sys.modules
    assert lp.first_module() is None
    lp.put_first_module(True)
    lp.forget_broken_step([])


def test_only_delayed_scaling_has_tensors() -> None:
    delayed = SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3), recipe="delayed")
    module = SimpleNamespace(fp8_meta={"scaling_fwd": delayed, "scaling_bwd": SimpleNamespace(recipe="current")})
    found = {name: holder[key] for name, holder, key in lp.scaling_state(module)}
    assert found == {"scaling_fwd.scale": delayed.scale, "scaling_fwd.amax_history": delayed.amax_history}
    assert list(lp.scaling_state(torch.nn.Linear(2, 2))) == []


def test_attention_in_fp8_is_refused_where_it_keeps_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    from deadpool_megatron.compat import UserError

    def refused(fp8_recipe: str, of_attention: str = "", name: str = "fp8_dot_product_attention") -> bool:
        monkeypatch.setenv("NVTE_DPA_FP8_RECIPE", of_attention)
        try:
            lp.prepare_scaling([], SimpleNamespace(**{name: True}, fp8="e4m3", fp8_recipe=fp8_recipe))
        except UserError as err:
            return str(err).startswith(f"{name} of the model's config is supported with --deadpool in MXFP8 only")
        return False

    assert refused("tensorwise") and refused("current", name="fp8_multi_head_attention")
    assert not refused("mxfp8") and refused("mxfp8", "DelayedScaling") and refused("mxfp8", "Float8CurrentScaling")
    assert not refused("tensorwise", "MXFP8BlockScaling") and not refused("tensorwise", "F16")
    lp.prepare_scaling([], SimpleNamespace(fp8="hybrid", fp8_recipe="tensorwise"))


def test_single_modules_may_have_recipes_without_state_only() -> None:
    from deadpool_megatron.compat import UserError

    def config(recipe: str) -> SimpleNamespace:
        configs = {"one": {"training_recipe": {"fp8_quantization_recipe": recipe}}}
        return SimpleNamespace(fp8="e4m3", fp8_recipe="mxfp8", quant_recipe=SimpleNamespace(configs=configs))

    assert lp.prepare_scaling([], config("tensorwise")) == []
    with pytest.raises(UserError, match=r"^--te-precision-config-file with custom recipes is not supported"):
        lp.prepare_scaling([], config("custom"))
