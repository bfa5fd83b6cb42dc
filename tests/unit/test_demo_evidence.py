"""The demo calls two runs equal only if they are, and says of each difference where it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from deadpool_megatron.demo.evidence import Evidence, ProcessIdentity, Step, compare, steps_of
from deadpool_megatron.demo.report import show_evidence, show_verdict
from deadpool_megatron.observe.recoveries import Recovery


def _step(iteration: int, loss: float, epoch: int = 0, grad_norm: float = 1.5) -> Step:
    return Step(iteration, epoch, {"lm loss": loss.hex(), "grad norm": grad_norm.hex()}, 0.5, 0.001)


def _equal() -> Evidence:
    hashes = {"0": {"params": "aa", "rng": "bb"}, "1": {"params": "cc", "rng": "dd"}}
    survivors = {1: ProcessIdentity(100, 1.0), 2: ProcessIdentity(101, 1.5)}
    return Evidence(
        expected=3,
        undisturbed=[_step(0, 5.0), _step(1, 4.0), _step(2, 3.0)],
        disturbed=[_step(0, 5.0), _step(1, 4.0), _step(1, 4.0, epoch=1), _step(2, 3.0, epoch=1)],
        undisturbed_hashes=hashes,
        disturbed_hashes={rank: dict(parts) for rank, parts in hashes.items()},
        before=survivors,
        after=dict(survivors),
    )


def test_equal_runs_have_no_difference() -> None:
    assert compare(_equal()) == []


def test_last_bit_of_a_loss_is_a_difference() -> None:
    one_ulp = float.fromhex("0x1.0000000000001p+2")
    evidence = replace(_equal(), disturbed=[_step(0, 5.0), _step(1, one_ulp), _step(2, 3.0)])
    (line,) = compare(evidence)
    assert "iteration 1" in line and "lm loss" in line


def test_redone_iteration_is_compared_as_well_as_the_first_time() -> None:
    for wrong in (0, 1):
        steps = [_step(0, 5.0), _step(1, 4.0), _step(1, 4.0, epoch=1), _step(2, 3.0, epoch=1)]
        steps[1 + wrong] = _step(1, 4.5, epoch=wrong)
        (line,) = compare(replace(_equal(), disturbed=steps))
        assert f"iteration 1 (epoch {wrong})" in line


def test_grad_norm_counts() -> None:
    steps = [_step(0, 5.0), _step(1, 4.0, grad_norm=1.25), _step(2, 3.0)]
    (line,) = compare(replace(_equal(), disturbed=steps))
    assert "grad norm" in line


def test_missing_iteration_is_a_difference_unless_its_report_may_have_died_with_the_node() -> None:
    without = replace(_equal(), disturbed=[_step(0, 5.0), _step(2, 3.0, epoch=1)])
    (line,) = compare(without)
    assert "iteration 1" in line and "disturbed" in line
    assert compare(replace(without, mute=frozenset({1}))) == []


def test_missing_iteration_of_the_undisturbed_run_is_never_excused() -> None:
    assert compare(replace(_equal(), undisturbed=[_step(0, 5.0), _step(2, 3.0)], mute=frozenset({1})))


@pytest.mark.parametrize("side", ["undisturbed_hashes", "disturbed_hashes"])
def test_hash_that_only_one_run_has_is_a_difference(side: str) -> None:
    fewer = {"0": {"params": "aa", "rng": "bb"}, "1": {"params": "cc"}}
    (line,) = compare(replace(_equal(), **{side: fewer}))
    assert line == "rank 1: SHA-256 of rng differs"


def test_different_hash_names_rank_and_part() -> None:
    other = {"0": {"params": "aa", "rng": "xx"}, "1": {"params": "cc", "rng": "dd"}}
    assert compare(replace(_equal(), disturbed_hashes=other)) == ["rank 0: SHA-256 of rng differs"]


def test_no_hashes_at_all_are_not_equality() -> None:
    assert compare(replace(_equal(), undisturbed_hashes={}, disturbed_hashes={}))


def test_survivor_with_a_new_process_is_a_difference_even_under_the_same_pid() -> None:
    after = {1: ProcessIdentity(100, 9.0), 2: ProcessIdentity(101, 1.5)}
    (line,) = compare(replace(_equal(), after=after))
    assert line.startswith("rank 1")


def test_survivor_that_is_gone_is_a_difference() -> None:
    (line,) = compare(replace(_equal(), after={1: None, 2: ProcessIdentity(101, 1.5)}))
    assert "not seen" in line


def test_no_survivor_seen_is_not_equality() -> None:
    assert compare(replace(_equal(), before={}, after={}))


def test_steps_keep_every_digit_of_the_event_log() -> None:
    event = {
        "event": "iteration",
        "iteration": 4,
        "epoch": 1,
        "losses_hex": {"lm loss": "0x1.0000000000001p+2"},
        "grad_norm_hex": None,
        "seconds": 0.5,
        "blocked_s": 0.25,
    }
    (step,) = steps_of([{"event": "committed"}, event])
    assert step.exact == {"lm loss": "0x1.0000000000001p+2"}
    assert step.loss == "4.000000000000001" and step.epoch == 1


def _shown(evidence: Evidence) -> tuple[bool, str]:
    console = Console(width=200, no_color=True)
    with console.capture() as shown:
        show_evidence(console, evidence, 1)
        equal = show_verdict(console, evidence, Recovery(lost=[0], generation=1), 1, 0.8)
    return equal, shown.get()


def test_verdict_of_equal_runs_is_one_line() -> None:
    equal, text = _shown(_equal())
    assert equal and "DIFFER" not in text
    assert text.splitlines()[-1].startswith("EQUAL: node 0 lost in iteration 1, resumed from 1; 3 losses, 4 SHA-256")


def test_every_kind_of_difference_is_seen_in_its_table_and_in_the_verdict() -> None:
    other = {"0": {"params": "aa", "rng": "xx"}, "1": {"params": "cc", "rng": "dd"}}
    for changed in (
        {"disturbed_hashes": other},
        {"disturbed": [_step(0, 5.0), _step(1, 4.25), _step(2, 3.0)]},
        {"after": {1: None, 2: ProcessIdentity(101, 1.5)}},
    ):
        equal, text = _shown(replace(_equal(), **changed))
        assert not equal
        assert text.splitlines()[-1].startswith("DIFFERENT: node 0 lost in iteration 1")
        assert "DIFFERS" in text or "3 of 4 digests equal" in text
