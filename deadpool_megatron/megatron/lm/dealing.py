"""A global batch whose microbatches no number of replicas divides: replicas get counts that differ by one.

Upstream asserts that global batch / (micro batch * replicas) is a whole number. Here replica d of W takes microbatches
d, d + W, d + 2W ... of the N of a global batch, as upstream deals them where W divides N, so the samples of each batch
are the same at every width. What is averaged over microbatches and replicas is divided by N / W in the place of a
replica's own count: times upstream's 1 / W each microbatch weighs 1 / N. With ``--calculate-per-token-loss`` upstream
sums, so nothing has to be done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from deadpool_megatron.compat import UserError
from deadpool_megatron.megatron.host import Call, Host

# By the name in ``args``: what needs as many microbatches on each replica.
_EVEN: Final = (
    ("virtual_pipeline_model_parallel_size", "an interleaved pipeline schedule"),
    ("num_experts", "experts"),
    ("mtp_num_layers", "--mtp-num-layers"),
    ("hybrid_context_parallel", "--hybrid-context-parallel"),
    ("perform_rl_step", "--perform-rl-step"),
    ("te_precision_config_file", "--te-precision-config-file"),  # which may have delayed scaling
)
_DELAYED: Final = "--tp-only-amax-red, or another --fp8-recipe"
# With these upstream deals itself what replicas do not divide, or refuses it.
_SCHEDULES: Final = ("step_batch_size_schedule", "rampup_batch_size", "decrease_batch_size_if_needed")
_SAMPLER: Final = "MegatronPretrainingSampler"


class Count(int):
    """This replica's number of microbatches; ``whole / parts`` is the mean of all.

    Upstream counts the samples of all replicas as this number times the micro batch size times the replicas: so its
    products are of the mean, and an integer as soon as they are one.
    """

    whole: int
    parts: int

    def __new__(cls, mine: int, whole: int, parts: int) -> Count:
        count = super().__new__(cls, mine)
        count.whole, count.parts = whole, parts
        return count

    def __mul__(self, other: int) -> int:
        whole = self.whole * other
        exact, rest = divmod(whole, self.parts)
        return Count(exact, whole, self.parts) if rest else exact

    __rmul__ = __mul__

    @property
    def mean(self) -> float:
        """Microbatches of a replica, on average."""
        return self.whole / self.parts


class _Calculator:
    """In the place of upstream's, which is that of one replica with all microbatches."""

    def __init__(self, one: Any, replicas: int) -> None:
        self._one = one
        self._replicas = replicas

    def __getattr__(self, name: str) -> Any:
        return getattr(self._one, name)

    def get(self) -> Count:
        """Number of microbatches of this replica."""
        whole: int = self._one.get()
        each, more = divmod(whole, self._replicas)
        return Count(each + (_replica() < more), whole, self._replicas)


def _check_report(store: list[Any]) -> None:
    """Scripts that report plain averages make them with a collective for each microbatch; sums need none.

    All replicas have a first microbatch, so they all come here. Raises UserError.
    """
    newest = store[-1] if store else None
    for name, value in newest.items() if isinstance(newest, dict) else ():
        if torch.is_tensor(value) and value.numel() == 1:
            raise UserError(
                f"the script's loss function reports {name} as an average, and may communicate for that in each "
                "microbatch, of which replicas have counts that differ; use a --global-batch-size that they divide"
            )


def _replica() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank() if parallel_state.model_parallel_is_initialized() else 0


def uneven(args: Mapping[str, Any]) -> str:
    """Why replicas of this job cannot have counts of microbatches that differ, and what to do; empty: they can."""
    for name, said in _EVEN:
        if args.get(name):
            return f"{said} cannot do with counts that differ; use a number that divides it"
    if args.get("fp8") and args.get("fp8_recipe") == "delayed" and not args.get("tp_only_amax_red"):
        # Replicas reduce the largest values after each microbatch.
        return f"delayed scaling of FP8 cannot do with counts that differ; give {_DELAYED}"
    if args.get("dataloader_type") != "single":
        return "only --dataloader-type single can be dealt with counts that differ"
    return ""


def deals(args: Mapping[str, Any], replicas: int) -> bool:
    """Whether so many replicas can have the microbatches of each global batch, in counts that differ by one at most."""
    microbatches, rest = divmod(args["global_batch_size"], args["micro_batch_size"])
    return not rest and microbatches >= replicas and (microbatches % replicas == 0 or not uneven(args))


class Dealing:
    """Of one worker process. Inactive where upstream deals evenly.

    Attributes:
        resizes: the job may go on with another number of replicas, whatever sizes it was given for its own.
        fixed: its global batch does not follow from the number of replicas.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.resizes = False
        self.fixed = True
        self._batch = 0
        self._microbatches = 0
        self._replicas = 0

    def install(self) -> None:
        """Hook into what upstream computes from the global batch."""
        from megatron.core import num_microbatches_calculator
        from megatron.training import arguments, training, yaml_arguments

        self._host.replace(num_microbatches_calculator, "_build_num_microbatches_calculator", self._calculator)
        self._host.replace(arguments, "validate_args", self._validate)
        self._host.replace(yaml_arguments, "validate_yaml", self._validate)
        self._host.replace(training, "build_train_valid_test_data_loaders", self._loaders)

    def check(self, args: Mapping[str, Any]) -> None:
        """Raises UserError for what cannot be dealt unevenly."""
        if not self._batch:
            return
        what = (
            f"--global-batch-size {self._batch} is {self._microbatches} microbatches, which {self._replicas} replicas "
            "do not divide evenly"
        )
        if self._microbatches < self._replicas:
            raise UserError(f"{what}: there are fewer than replicas; use fewer nodes, or a smaller --micro-batch-size")
        if why := uneven(args):
            raise UserError(f"{what}, and {why}")
        if args.get("rank") == 0:
            fewest, more = divmod(self._microbatches, self._replicas)
            print(
                f"deadpool: {what}: {more} replicas get {fewest + 1}, the others {fewest}, and each microbatch weighs "
                "as much; an evaluation takes as many samples as they divide",
                flush=True,
            )

    def _calculator(self, call: Call) -> Any:
        batch, micro, replicas = (call[n] for n in ("global_batch_size", "micro_batch_size", "data_parallel_size"))
        if (
            any(call.get(name) for name in _SCHEDULES)
            or batch is None
            or batch % micro
            or batch % (micro * replicas) == 0
        ):
            return call()
        if not self._batch:
            self._weigh()
        self._batch, self._microbatches, self._replicas = batch, batch // micro, replicas
        call["data_parallel_size"] = 1
        return _Calculator(call(), replicas)

    def _weigh(self) -> None:
        from megatron.core.pipeline_parallel import schedules

        def loss(call: Call) -> Any:
            count = call["num_microbatches"]
            if not isinstance(count, Count):
                return call()
            call["num_microbatches"] = count.mean
            out = call()
            _check_report(call["forward_data_store"])
            return out

        self._host.replace(schedules, "forward_step_calc_loss", loss)

    def _validate(self, call: Call) -> Any:
        """Evaluation, which is no part of training, takes as many samples as can be dealt evenly."""
        args = call.first()
        if any(getattr(args, name, None) for name in _SCHEDULES):
            return call()
        parallel = getattr(args, "model_parallel", None)  # of a YAML file
        batch, micro, given, given_micro = (
            getattr(args, f"{kind}_batch_size", None) for kind in ("global", "micro", "eval_global", "eval_micro")
        )
        self.fixed = batch is not None
        if batch and micro and (parallel is not None or hasattr(args, "eval_global_batch_size")):
            ranks = math.prod(
                getattr(parallel or args, f"{kind}_parallel_size")
                for kind in ("tensor_model", "pipeline_model", "context")
            )
            replicas = max(1, args.world_size // ranks)
            even = (given_micro or micro) * replicas
            uneven = given is None and batch % micro == 0 and batch % (micro * replicas) > 0
            if (uneven or self.resizes) and (given or batch) % even:
                args.eval_global_batch_size = max(even, (given or batch) // even * even)
        return call()

    def _loaders(self, call: Call) -> Any:
        loaders = call()
        train = loaders[0]
        if self._batch and train is not None:
            sampler = train.batch_sampler
            if type(sampler).__name__ != _SAMPLER:
                raise UserError(f"{type(sampler).__name__} cannot deal microbatches in counts that differ")
            sampler.__class__ = _uneven(type(sampler), self._batch, self._replicas)
        return loaders


def _uneven(kind: type, batch: int, replicas: int) -> type:
    """Upstream's sampler, dealing global batch by global batch."""

    class Uneven(kind):  # type: ignore[misc]
        def __iter__(self) -> Iterator[list[int]]:
            micro = self.micro_batch_size
            for begin in range(self.consumed_samples, self.total_samples - batch + 1, batch):
                for at in range(begin + self.data_parallel_rank * micro, begin + batch, replicas * micro):
                    yield list(range(at, at + micro))

    return Uneven
