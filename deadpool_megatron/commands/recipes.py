"""`deadpool check --recipe` and `--recipes`: what a swap can carry of recipes of Megatron-Bridge."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import threading
import urllib.error
import urllib.request
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from deadpool_megatron import emulation, support
from deadpool_megatron.compat import UserError

if TYPE_CHECKING:
    from deadpool_megatron.megatron.bridge.recipes import Recipe

_ANSWERS_S: Final = 5.0
# A setting as a user writes it, and why it is refused.
type Refusal = tuple[str, str]


@contextlib.contextmanager
def bridge() -> Iterator[None]:
    """Megatron-Bridge under the emulation of CUDA, and without what it and its packages say while they are imported and
    build recipes. Raises UserError where it is not installed."""
    if importlib.util.find_spec("megatron.bridge") is None:
        raise UserError("Megatron-Bridge is not in this environment: install megatron-bridge, or put it on PYTHONPATH")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # recipes are judged for the machine that they name
    os.environ.setdefault("WORLD_SIZE", "1")
    logging.disable(logging.CRITICAL)
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        _stay_offline()
        emulation.find_transformer_engine()
        emulation.install()
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]  # of the emulation; recipes may want another one
        yield


def read(name: str, overrides: Sequence[str], nodes: int | None, per_node: int | None) -> Recipe:
    """A recipe for so many nodes of so many processes; what is not given is what its name says. Raises UserError."""
    with bridge():
        from deadpool_megatron.megatron.bridge import recipes

        return recipes.build(name, overrides, nodes, per_node)


def refusals(recipe: Recipe) -> list[Refusal]:
    """All that a swap cannot carry of a recipe; numbers are left out."""
    named = ((each, each.value(recipe.values)) for each in support.refused(recipe.values, recipe.per_node))
    return [*((e.flag if not v or v.isdecimal() else f"{e.flag} {v}", e.because) for e, v in named), *recipe.refused]


def notes(recipe: Recipe) -> Iterator[str]:
    """What is to be known of how a recipe was read, one by one."""
    for name in recipe.assumed:
        yield _copied(name)
    if recipe.complaint:
        yield f"Megatron-Bridge would not train this recipe as it is here: {recipe.complaint}"


def judge_all(per_node: int | None) -> Iterable[str]:
    """Judge each performance recipe of pre-training at its published size; gives the lines of a report in Markdown."""
    accepted: list[str] = []
    refused: dict[str, list[Refusal]] = {}
    unread: list[str] = []
    assumed: set[str] = set()
    with bridge():
        from deadpool_megatron.megatron.bridge import recipes

        version = recipes.version()
        for name, function in recipes.performance_recipes().items():
            try:
                recipe = recipes.build(name, per_node=per_node, function=function)
            except UserError as err:
                unread.append(str(err))
                continue
            assumed |= recipe.assumed.keys()
            if found := refusals(recipe):
                refused[name] = found
            else:
                accepted.append(name)
    yield (
        f"accepted: {len(accepted)} of {len(accepted) + len(refused) + len(unread)} performance recipes of "
        f"megatron-bridge {version}"
    )
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, found in refused.items():
        for flag, because in found:
            reasons[flag, because].append(name)
    yield ""
    yield from ("| recipes | of these for nothing else | refused for | why |", "|---|---|---|---|")
    for (flag, because), names in sorted(reasons.items(), key=lambda each: (-len(each[1]), each[0])):
        alone = sum(len(refused[name]) == 1 for name in names)
        yield f"| {len(names)} | {alone} | `{flag}` | {because} |"
    yield ""
    for name, found in sorted(refused.items()):
        yield f"refused: {name}: {', '.join(dict.fromkeys(flag for flag, _ in found))}"
    yield from (f"not read: {line}" for line in unread)
    yield from (f"note: {_copied(name)}" for name in sorted(assumed))


def _copied(name: str) -> str:
    return f"the architecture of {name} is DeadPool's own copy: the hub and its cache do not have it here"


def _stay_offline() -> None:
    """Ask Hugging Face's hub for nothing where it does not answer: its package, not imported yet, would try for half a
    minute for each file. What is in its cache is read all the same."""
    if "HF_HUB_OFFLINE" not in os.environ and not _answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        os.environ["HF_HUB_OFFLINE"] = "1"


def _answers(url: str) -> bool:
    heard = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_ANSWERS_S).close()
        except urllib.error.HTTPError:
            pass  # an answer
        except (OSError, ValueError):
            return
        heard.set()

    # A thread: nothing bounds how long a name is looked up.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWERS_S)
    return heard.is_set()
