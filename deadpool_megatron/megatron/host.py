"""The training loop that DeadPool is in: all that differs between those that run on megatron.core.

A host says which of the loop's functions the hooks (`hooks.Hooks`) replace, and does in the loop's own way what they
need of it. Whoever reads or restores state asks the host, and knows no loop.
"""

from __future__ import annotations

import functools
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from deadpool_megatron.compat import UserError

if TYPE_CHECKING:
    from deadpool_megatron.megatron.hooks import Hooks


class Call:
    """A call of one of the loop's functions that is still to be made: ``call()`` makes it, ``call["model"]`` is an
    argument of it, which may be replaced before."""

    def __init__(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> None:
        self._original = original
        self._bound = bound

    def __call__(self) -> Any:
        return self._original(*self._bound.args, **self._bound.kwargs)

    def __getitem__(self, name: str) -> Any:
        return self._bound.arguments[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._bound.arguments[name] = value

    def get(self, name: str) -> Any:
        """An argument that some versions have not; None there."""
        return self._bound.arguments.get(name)

    def first(self) -> Any:
        """The first argument, whatever its name."""
        return next(iter(self._bound.arguments.values()))


class Fields(Protocol):
    """What of the loop's own objects is state of the run: counters, and whatever a checkpoint has changed in them.

    Attributes:
        settings: those that are none, as the job began; the same for the whole job.
    """

    settings: Mapping[str, Any]

    def loading(self) -> AbstractContextManager[None]:
        """A checkpoint is loaded meanwhile: what it changes is state."""

    def training_begins(self) -> None:
        """What differs from now on is state."""

    def read(self, iteration: int) -> dict[str, Any]:
        """All of it at the start of ``iteration``, by the loop's own names; to be encoded. Called every iteration."""

    def write(self, saved: dict[str, Any]) -> None:
        """Make it what `read` has returned, here or in another process, and nothing else."""

    def put(self, saved: Mapping[str, Any]) -> None:
        """Set some of it."""


class Host(ABC):
    """A training loop. One a process, and its hooks are used by the training thread.

    Attributes:
        upstream: the release that is known to have all that the hooks replace, for whoever lacks some of it.
        fields: there once `Hooks.initialize` has made its call, before a checkpoint is loaded.
        brings_environment: the loop sets variables of the environment before it brings up the device.
        can_rehearse: all that its set-up does outside of the process goes through `Hooks.open_outlet`, or is named by
            `not_rehearsed`.
    """

    brings_environment: ClassVar[bool] = False
    can_rehearse: ClassVar[bool] = False
    upstream: str
    fields: Fields

    @abstractmethod
    def install(self, hooks: Hooks) -> None:
        """Put the hooks in place. Raises UserError for a version that is not supported."""

    @property
    @abstractmethod
    def args(self) -> Mapping[str, Any]:
        """Settings and counters of now, by the names of Megatron-LM's ``args``. Empty before there are any."""

    def deals(self, replicas: int) -> bool:
        """So many replicas can have the samples of each global batch, those of an evaluation too, and they are the
        samples of any other number of replicas."""
        args = self.args
        batches = [(args[f"{kind}global_batch_size"], args[f"{kind}micro_batch_size"]) for kind in ("", "eval_")]
        return not any(batch % (micro * replicas) for batch, micro in batches)

    @property
    @abstractmethod
    def begun(self) -> float:
        """When the job began, in seconds since the epoch: its allotted time (``--exit-duration-in-mins``) runs from
        there. A process that comes later is given that of the others: it is no part of a generation, which may be
        taken up by another job."""

    @begun.setter
    @abstractmethod
    def begun(self, seconds: float) -> None: ...

    @property
    @abstractmethod
    def timers(self) -> Any:
        """megatron.core's ``Timers`` of this loop."""

    @property
    @abstractmethod
    def context(self) -> dict[str, Any]:
        """What saves hand on to later ones, upstream's checkpointing context."""

    @property
    @abstractmethod
    def writers(self) -> tuple[Any, Any]:
        """TensorBoard's and Weights & Biases' of this rank; None where it has none."""

    @property
    @abstractmethod
    def async_saves(self) -> Any:
        """The queue of asynchronous checkpoints (megatron.core's ``AsyncCallsQueue``); None where there is none."""

    def environment(self) -> dict[str, str]:
        """The variables that this job's loop sets where they are not set yet."""
        return {}

    def arguments_for_script(self, arguments: list[str]) -> list[str]:
        """What of them the script's own parser knows."""
        return arguments

    @property
    def flags(self) -> list[str]:
        """The command line, where it is one of Megatron's flags."""
        return []

    @abstractmethod
    def outlets(self) -> Iterable[tuple[Any, str]]:
        """Holder and name of the functions by which the loop prints and writes what an iteration gave."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run once what is slow the first time. In a process that waits to be given a coordinate."""

    def not_rehearsed(self) -> str:
        """The flag by which the set-up of this coordinate does what others see; empty: there is none."""
        return ""

    def rehearse_data(self, build: Call) -> None:
        """Do ahead of time what of ``build``, which makes the data iterators, depends on no generation. It leaves
        nothing behind that is seen elsewhere."""
        return

    def wake_timers(self) -> None:
        """This process has waited: what is being timed begins now."""
        for timer in self.timers._timers.values():
            if timer._started:
                timer._start_time = time.time()

    @abstractmethod
    def load_nothing(self) -> None:
        """No checkpoint is to be read: the state comes from a vault."""

    @abstractmethod
    def save_into(self, directory: str) -> None:
        """Checkpoints go there from now on, and are complete when the call that saves them returns."""

    @abstractmethod
    def save(self, iteration: int) -> None:
        """Write a checkpoint of the state of now, by the hooked function. Within ``train``."""

    @abstractmethod
    def finalize(self) -> None:
        """Wait until all checkpoints are complete, by the hooked function."""

    @abstractmethod
    def unwind(self, config: Any) -> None:
        """Drop what the loop's own globals and the model's ``config`` have of a broken step, and the queue of
        asynchronous checkpoints, which has been closed: the next save gets one as on a spare."""

    def replace(self, module: Any, name: str, hook: Callable[[Call], Any]) -> None:
        """Let ``hook`` make the calls of a module's function. Raises UserError where there is no such function."""
        if not hasattr(module, name):
            raise UserError(
                f"{module.__name__} has no {name}, which DeadPool hooks into: use {self.upstream} unchanged"
            )
        original = getattr(module, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return hook(Call(original, signature.bind(*args, **kwargs)))

        setattr(module, name, replaced)
