"""What of Megatron is supported, by its flags, with what stands behind it. Imports nothing of Megatron.

One table: `deadpool check` judges a command line by it, the start of a job refuses by it, docs/support.md shows it.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deadpool_megatron.compat import UserError

Values = Mapping[str, Any]


class Evidence(enum.StrEnum):
    """What is known of a feature under a lost node; from the most to the least."""

    GPU = "run on a GPU"
    EMULATION = "run on the emulation"
    SOURCES = "reasoned from the sources"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that a swap must carry, or cannot.

    Attributes:
        name: of what.
        flag: as a user writes it, with the value that selects it where one does.
        selects: whether values of Megatron's ``args``, by attribute, on nodes of so many processes select it.
        evidence: what is known.
        because: the test, the reason, or why it is refused.
    """

    name: str
    flag: str
    selects: Callable[[Values, int], bool]
    evidence: Evidence
    because: str

    @property
    def attribute(self) -> str:
        """The flag's, of Megatron's ``args``."""
        return attribute_of(self.flag)

    def value(self, values: Values) -> str:
        """What to say after the flag of the value that it has here: nothing where that is True or said already."""
        value = values.get(self.attribute, True)
        return "" if value is True or " " in self.flag else str(value)


PROCESSES_PER_NODE: Final = 8  # where nobody says it


def _above_one(value: object) -> bool:
    return value not in (None, False, 1, "1")


def _is(*wanted: object) -> Callable[[Any], bool]:
    """The value, or one of several that a flag has, is among these."""
    return lambda value: bool({*_listed(value)} & {*wanted})


def _other_than(*known: object) -> Callable[[Any], bool]:
    return lambda value: value not in (None, *known)


def _below_zero(value: object) -> bool:
    return str(value).startswith("-")


# In the source repository: what `pytest --evidence` has recorded, the names of tests by name of a feature.
RECORD: Final = "docs/measurements/features.json"

_SWAPS = "tests/integration/test_hot_swap.py"
_TE = "tests/integration/test_transformer_engine.py"
_MORE = "tests/integration/test_features.py"
_OPTIMIZERS = "tests/integration/test_optimizers.py"
_MODELS = "tests/integration/test_other_models.py"
_GRAPHS = "tests/integration/test_graphs.py"
_FLEX = "tests/integration/test_flex.py"
_OVERLAP = "tests/integration/test_userbuffers.py"

_GDN: Final = ("gated_delta_net", "gdn")  # the same layer; its second name is that of 0.20
_ACCEPTED: Final = (
    # layout
    ("tensor parallelism", "--tensor-model-parallel-size", _above_one, _SWAPS),
    ("pipeline parallelism", "--pipeline-model-parallel-size", _above_one, _SWAPS),
    ("interleaved pipeline", "--num-layers-per-virtual-pipeline-stage", bool, _SWAPS),
    ("sequence parallelism", "--sequence-parallel", bool, _TE),
    ("tensor parallelism in userbuffers, inside a node", "--tp-comm-overlap", bool, _OVERLAP),
    ("context parallelism", "--context-parallel-size", _above_one, _TE),
    ("hierarchical context parallelism", "--hierarchical-context-parallel-sizes", bool, _TE),
    ("experts", "--num-experts", bool, _TE),
    ("expert parallelism", "--expert-model-parallel-size", _above_one, _TE),
    ("grouped GEMM of experts", "--moe-grouped-gemm", bool, _TE),
    ("fused permutation", "--moe-permute-fusion", bool, _TE),
    ("fused router", "--moe-router-fusion", bool, _TE),
    ("bias of experts", "--moe-router-enable-expert-bias", bool, _TE),
    ("shared experts", "--moe-shared-expert-intermediate-size", bool, _TE),
    ("tokens by DeepEP or HybridEP", "--moe-token-dispatcher-type flex", _is("flex"), _FLEX),
    ("activations of experts in pages", "--moe-paged-stash", bool, _FLEX),
    ("overlapped communication of experts", "--overlap-moe-expert-parallel-comm", bool, _TE),
    ("delayed weight gradients", "--delay-wgrad-compute", bool, _TE),
    ("distributed optimizer", "--use-distributed-optimizer", bool, _SWAPS),
    ("several instances of the distributed optimizer", "--num-distributed-optimizer-instances", _above_one, _TE),
    ("overlapped gradient reduction", "--overlap-grad-reduce", bool, _SWAPS),
    ("overlapped parameter gather", "--overlap-param-gather", bool, _SWAPS),
    ("parameter gather beside the optimizer step", "--overlap-param-gather-with-optimizer-step", bool, _TE),
    ("user buffers of NCCL (left out: nothing is registered with a communicator)", "--use-nccl-ub", bool, _TE),
    # model
    ("hybrid models (Mamba)", "--hybrid-layer-pattern", bool, _MODELS),
    ("layers of Transformer Engine", "--transformer-impl transformer_engine", _is("transformer_engine"), _TE),
    ("multi-latent attention", "--multi-latent-attention", bool, _TE),
    ("sparse attention", "--experimental-attention-variant dsa", _is("dsa"), _TE),
    ("gated delta nets (gdn in 0.20)", "--experimental-attention-variant gated_delta_net", _is(*_GDN), _TE),
    ("multi-token prediction", "--mtp-num-layers", bool, _TE),
    ("operation fuser", "--use-transformer-engine-op-fuser", bool, _TE),
    ("recomputation", "--recompute-granularity", bool, _TE),
    ("activations on the host", "--fine-grained-activation-offloading", bool, _TE),
    ("CUDA graphs of layers", "--cuda-graph-impl transformer_engine", _is("transformer_engine"), _GRAPHS),
    ("CUDA graphs of whole iterations", "--cuda-graph-impl full_iteration", _is("full_iteration"), _GRAPHS),
    # precision
    ("FP8 with delayed scaling", "--fp8-recipe delayed", _is("delayed"), _TE),
    ("FP8 with current scaling", "--fp8-recipe tensorwise", _is("tensorwise"), _TE),
    ("FP8 with blockwise scaling", "--fp8-recipe blockwise", _is("blockwise"), _TE),
    ("MXFP8", "--fp8-recipe mxfp8", _is("mxfp8"), _TE),
    ("NVFP4", "--fp4-recipe nvfp4", _is("nvfp4"), _TE),
    ("parameters in FP8", "--fp8-param-gather", bool, _TE),
    ("parameters in FP4", "--fp4-param-gather", bool, _TE),
    ("precision of single modules", "--te-precision-config-file", bool, _TE),
    ("precision-aware optimizer", "--use-precision-aware-optimizer", bool, _TE),
    ("Lion, Muon", "--optimizer", _is("lion", "muon", "dist_muon"), _OPTIMIZERS),
    # around training
    ("asynchronous checkpoints", "--async-save", bool, _MORE),
    ("other data loaders", "--dataloader-type", _is("cyclic", "external"), _MORE),
)
_REASONED: Final = (
    (
        "SGD",
        "--optimizer sgd",
        _is("sgd"),
        "torch's, taken without Transformer Engine and apex, changes in place; theirs is refused at start",
    ),
)
_GTP: Final = "GTP cuts weights along an axis of its own: who holds which shard is not what the arithmetic assumes"
_OPTIMIZER_NAMES: Final = ("adam", "sgd", "lion", "muon", "dist_muon")
# Flag, when its value is one that DeadPool cannot carry through a swap yet, and why.
_REFUSED: Final[tuple[tuple[str, Callable[[Any], bool], str], ...]] = (
    ("--use-megatron-fsdp", bool, "parameters and optimizer state are sharded in another way"),
    ("--use-torch-fsdp2", bool, "parameters and optimizer state are sharded in another way"),
    (
        "--cuda-graph-impl",
        _other_than("none", "full_iteration", "transformer_engine"),
        "graphs of Megatron's own kind hold the old communicators; those of Transformer Engine are captured anew",
    ),
    ("--optimizer-cuda-graph", bool, "the gate before the step would be inside of the graph"),
    (
        "--optimizer",
        _other_than(*_OPTIMIZER_NAMES),
        "its state is not known (soap replaces its tensors instead of updating them in place; adaptive_muon has never "
        "been run)",
    ),
    ("--experimental-attention-variant", _other_than("dsa", *_GDN), "never run"),
    (
        "--moe-flex-dispatcher-backend",
        _is("ncclep"),
        "its communicator is Transformer Engine's own, for the whole process, and nothing forms it anew",
    ),
    ("--optimizer-cpu-offload", bool, "state on the host and on the device by turns"),
    (
        "--qk-clip",
        bool,
        "it scales 16-bit and main parameters apart, so that what follows from the main ones is rounded otherwise",
    ),
    ("--cpu-offloading-num-layers", bool, "a broken iteration leaves Transformer Engine's offloading half-done"),
    ("--hybrid-context-parallel", bool, "its loader keeps samples that no position tells of"),
    ("--fim-data", bool, "its data set draws from random numbers of its own, whose state nobody carries"),
    ("--logits-load-dir", bool, "the teacher's logits are read at a position of their own"),
    ("--logits-save-dir", bool, "logits of a repeated iteration would be saved twice"),
    (
        "--moe-use-upcycling",
        bool,
        "a spare would convert the checkpoint again: convert in a run of its own, without --deadpool",
    ),
    (
        "--moe-router-force-biased",
        _below_zero,
        "a negative one is drawn once in each process, and a spare would draw others",
    ),
    (
        "--moe-routing-trace-path",
        bool,
        "a spare empties the file of its rank, and after each recovery all is recorded once more",
    ),
    ("--use-kitchen-attention", bool, "its quantizers may have state that nobody else knows of"),
    (
        "--pipeline-model-parallel-comm-backend",
        _other_than("nccl"),
        "only communicators of NCCL and Gloo are aborted and re-formed",
    ),
    ("--use-ring-exchange-p2p", bool, "it goes past the communicators that are aborted"),
    ("--symmetric-ar-type", bool, "symmetric memory is a communicator of its own"),
    ("--fp8-recipe", _is("custom"), "its quantizers may have state that nobody else knows of"),
    ("--fp4-recipe", _is("custom"), "its quantizers may have state that nobody else knows of"),
    ("--use-sharp", bool, "buffers registered with a communicator are gone with it"),
    ("--perform-rl-step", bool, "another training loop"),
    ("--inprocess-restart", bool, "two systems would handle the same failure"),
    ("--enable-ft-package", bool, "two systems would handle the same failure"),
    ("--vision-pretraining", bool, "another training loop"),
    ("--iterations-to-skip", bool, "not replayed"),
    ("--tensor-parallel-num-weight-shards", _above_one, _GTP),
    ("--expert-tensor-parallel-num-weight-shards", _above_one, _GTP),
)


def _number(values: Values, name: str, kind: type[int] | type[float]) -> float:
    """Raises UserError: a command that starts nothing is given flags that Megatron's parser has not seen."""
    value = values.get(name) or 0
    try:
        if isinstance(value, bool) or kind(value) != float(value):
            raise ValueError(value)
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        noun = "a whole number" if kind is int else "a number"
        raise UserError(f"--{name.replace('_', '-')}: expected {noun}, not {value!r}") from None


def _size(values: Values, *names: str) -> int:
    return next((int(_number(values, name, int)) for name in names if values.get(name)), 1)


def _drops_out(values: Values) -> bool:
    return any(_number(values, name, float) for name in ("attention_dropout", "hidden_dropout"))


def _flex(values: Values) -> bool:
    return values.get("moe_token_dispatcher_type") == "flex"


def waits_for_nodes(values: Values, processes: int) -> bool:
    """A rank may wait in a kernel for a rank of another node, on nodes of so many processes: nothing but the end of its
    process frees it. That is so where experts span nodes behind a flex dispatcher."""
    # Upstream's order of ranks has the tensor-parallel ones of an expert side by side, then the expert-parallel ones,
    # and such groups one after the other.
    experts = _size(values, "expert_model_parallel_size")
    experts *= _size(values, "expert_tensor_parallel_size", "tensor_model_parallel_size")
    return _flex(values) and processes % experts != 0


def _userbuffers_across_nodes(values: Values, processes: int) -> bool:
    return bool(values.get("tp_comm_overlap")) and processes % _size(values, "tensor_model_parallel_size") != 0


def flex_in_graphs(values: Values) -> bool:
    """Kernels of a flex dispatcher are part of CUDA graphs: of whole iterations, or of layers with ``moe`` or all."""
    return _flex(values) and "moe" in _graphed(values)


def _deepep_in_graphs(values: Values, _: int) -> bool:
    return flex_in_graphs(values) and values.get("moe_flex_dispatcher_backend") != "hybridep"


def _dropout_in_graphs(values: Values, _: int) -> bool:
    drops = "attn" in _graphed(values) and bool(_number(values, "attention_dropout", float))
    return _layer_graphs(values) and drops and _size(values, "context_parallel_size") > 1


def _delayed_in_graphs(values: Values, _: int) -> bool:
    return _layer_graphs(values) and _recipe(values) == "delayed"


def _offloading_in_graphs(values: Values, _: int) -> bool:
    outside = {"moe_act", "expert_fc1", "fused_group_mlp"} if "moe" not in _graphed(values) else set()
    offloaded = {*_listed(values.get("offload_modules") or "all")}
    return bool(values.get("fine_grained_activation_offloading") and _graphed(values) and offloaded - outside)


def _scaled_attention(values: Values, _: int) -> bool:
    low = values.get("fp8") or values.get("fp4")
    return bool(values.get("fp8_dot_product_attention") and low) and _recipe(values) != "mxfp8"


def _fuser_with_scales(values: Values, _: int) -> bool:
    recipe = _recipe(values)
    reduces = values.get("sequence_parallel") and (recipe == "tensorwise" or values.get("fp4"))
    return bool(values.get("use_transformer_engine_op_fuser") and (recipe == "delayed" or reduces))


def _recipe(values: Values) -> Any:
    """Of FP8; a recipe's name is there without FP8 too."""
    return values.get("fp8_recipe") if values.get("fp8") else None


def _layer_graphs(values: Values) -> bool:
    return values.get("cuda_graph_impl") == "transformer_engine"


def _graphed(values: Values) -> list[str]:
    """The modules that are captured; whole layers where none is named."""
    impl = values.get("cuda_graph_impl")
    if impl in (None, "none"):
        return []
    parts = _graph_modules(values) or ["full"]
    return [*parts, "attn", "moe"] if "full" in parts or impl == "full_iteration" else parts


def _graph_modules(values: Values) -> list[str]:
    """Those that are named. The older name of the flag counts where both are there, as Megatron's config has them."""
    named = values.get("cuda_graph_scope")
    named = values.get("cuda_graph_modules") if named is None else named
    return [part for each in _listed(named or []) for part in str(_name(each)).split(",")]


def _migrated(values: Values) -> Values:
    """With today's flags in the place of older ones, as Megatron does it."""
    older = {"enable_cuda_graph": "local", "external_cuda_graph": "transformer_engine"}
    impl = next((impl for name, impl in older.items() if values.get(name)), None)
    impl = "full_iteration" if "full_iteration" in _graph_modules(values) else impl
    return values if impl is None else {**values, "cuda_graph_impl": impl}


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _name(member: Any) -> Any:
    """Of a member of an enumeration of Megatron's, or the word itself."""
    return getattr(member, "name", member)


# The same of values that are refused together, and by where processes are.
_COMBINED: Final[tuple[tuple[str, Callable[[Values, int], bool], str], ...]] = (
    (
        "--tp-comm-overlap",
        _userbuffers_across_nodes,
        "where tensor parallelism spans nodes: nothing aborts a kernel of userbuffers that waits for a lost node",
    ),
    (
        "--cuda-graph-impl",
        _deepep_in_graphs,
        "with DeepEP inside of the graphs (whole iterations, or --cuda-graph-modules with moe or none): the host waits "
        "for counts in the middle of it, which no graph can capture; --moe-flex-dispatcher-backend hybridep",
    ),
    (
        "--moe-paged-stash",
        lambda values, _: bool(values.get("moe_paged_stash")) and _drops_out(values),
        "with dropout: an iteration whose activations find no room is done again, with other random numbers, and how "
        "much room there is each process learns in its first iterations; --attention-dropout 0 --hidden-dropout 0",
    ),
    (
        "--fp8-dot-product-attention",
        _scaled_attention,
        "with another recipe than mxfp8: its scores are cast with delayed scaling, whose state nobody else sees",
    ),
    (
        "--te-precision-config-file",
        lambda values, _: bool(values.get("te_precision_config_file")) and _recipe(values) == "delayed",
        "with --fp8-recipe delayed: never run; who has scales would be another matter for each module",
    ),
    (
        "--cuda-graph-impl",
        _delayed_in_graphs,
        "of layers, with --fp8-recipe delayed: on the emulation such graphs have other scales than the same layers "
        "without them, and after a swap some iterations are done without",
    ),
    (
        "--cuda-graph-impl",
        _dropout_in_graphs,
        "with context parallelism and dropout of attention inside of graphs of layers: never seen to end equal; "
        "--attention-dropout 0",
    ),
    (
        "--fine-grained-activation-offloading",
        _offloading_in_graphs,
        "of modules inside of CUDA graphs: never run; what is copied when is part of them",
    ),
    (
        "--use-transformer-engine-op-fuser",
        _fuser_with_scales,
        "with --fp8-recipe delayed: nobody else sees its scales; with tensorwise or NVFP4 under sequence parallelism: "
        "only from their second pass on do its operations reduce over the ranks what they scale by",
    ),
)
# Flags whose attribute has another name.
ATTRIBUTES: Final = {
    "fp8_format": "fp8",
    "fp4_format": "fp4",
    "use_nccl_ub": "nccl_ub",
    "tensor_parallel_num_weight_shards": "gtp_weight_remat_size",
    "expert_tensor_parallel_num_weight_shards": "expert_gtp_weight_remat_size",
}


def attribute_of(flag: str) -> str:
    """The attribute of Megatron's ``args`` of a flag, with dashes or without."""
    name = flag.split()[0].lstrip("-").replace("-", "_")
    return ATTRIBUTES.get(name, name)


# Attributes whose values say nothing without another one's: a recipe's name is there without FP8 too.
_NEEDS: Final = {"fp8_recipe": "fp8", "fp4_recipe": "fp4"}
# What the flags say that are not given, where that is a feature of the table.
DEFAULTS: Final[Mapping[str, Any]] = {
    "transformer_impl": "transformer_engine",
    "fp8_recipe": "delayed",
    "fp4_recipe": "nvfp4",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}


def _of_value(flag: str, test: Callable[[Any], bool]) -> Callable[[Values, int], bool]:
    """Whether the flag's value passes a test."""
    name = attribute_of(flag)
    return lambda values, _: test(values.get(name))


def _in_use(flag: str, test: Callable[[Any], bool]) -> Callable[[Values, int], bool]:
    """Whether it does, and says something."""
    name = attribute_of(flag)
    needs = _NEEDS.get(name, name)
    return lambda values, _: test(values.get(name)) and bool(values.get(needs))


COMBINATIONS: Final = (
    Feature(
        "tokens by DeepEP or HybridEP, across nodes",
        "--moe-token-dispatcher-type flex",
        waits_for_nodes,
        Evidence.EMULATION,
        _FLEX,
    ),
    Feature(
        "attention in MXFP8",
        "--fp8-dot-product-attention",
        lambda values, _: bool(values.get("fp8_dot_product_attention")) and _recipe(values) == "mxfp8",
        Evidence.EMULATION,
        _TE,
    ),
    *(Feature("", flag, selects, Evidence.REFUSED, why) for flag, selects, why in _COMBINED),
)
FEATURES: Final = (
    *(Feature(name, flag, _in_use(flag, test), Evidence.EMULATION, why) for name, flag, test, why in _ACCEPTED),
    *(Feature(name, flag, _in_use(flag, test), Evidence.SOURCES, why) for name, flag, test, why in _REASONED),
    *(Feature("", flag, _of_value(flag, test), Evidence.REFUSED, why) for flag, test, why in _REFUSED),
    *COMBINATIONS,
)
# Environment variables that change what backend a process group of torch has, and why that one is not supported.
_UNSUPPORTED_SETTINGS: Final[tuple[tuple[str, str], ...]] = (
    ("TORCH_DIST_USE_NCCL2", "ProcessGroupNCCL2 is neither aborted nor re-formed"),
    ("TORCH_DISTRIBUTED_USE_TORCHCOMMS", "communicators of torchcomms are neither aborted nor re-formed"),
)


# Begins the part of judged.txt that names flags of Megatron for the record only.
UNJUDGED: Final = "# Nobody has looked at these yet."


def used(values: Values, processes: int = PROCESSES_PER_NODE) -> list[Feature]:
    """The features that values of Megatron's ``args``, by attribute, select on nodes of so many processes; in the order
    of the table."""
    values = _migrated(values)
    return [each for each in FEATURES if each.selects(values, processes)]


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Values by attribute, of a command line. What is before the first flag (a script) is left out.

    Not Megatron's parser, which takes seconds to import: a flag without a value is True, one with several a list,
    whole numbers are numbers; of the defaults `DEFAULTS` alone are known.
    """
    values = dict(DEFAULTS)
    name = ""
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            name = attribute_of(flag)
            values[name] = _typed(value) if equals else True
        elif name:
            before = values[name]
            if before is True:
                values[name] = _typed(word)
            else:
                values[name] = [*(before if isinstance(before, list) else [before]), _typed(word)]
    return values


def _typed(word: str) -> int | str:
    return int(word) if word.isdecimal() else word


def refused(values: Values, processes: int = PROCESSES_PER_NODE) -> list[Feature]:
    """What of a job's flags a swap cannot carry, on nodes of so many processes."""
    return [each for each in used(values, processes) if each.evidence is Evidence.REFUSED]


def check_environment(environ: Mapping[str, str]) -> None:
    """Raises UserError that names the first variable that selects process groups that are not supported."""
    for name, why in _UNSUPPORTED_SETTINGS:
        value = environ.get(name, "0")
        if value.lower() not in ("", "0", "false", "no", "off", "n"):
            raise UserError(
                f"{name}={value} is not supported with --deadpool: {why}; unset it, or run without --deadpool"
            )


def check_arguments(values: Values, processes: int = PROCESSES_PER_NODE, adopted: bool = False) -> None:
    """Raises UserError that names the flags of all modes that are not supported on nodes of so many processes, which
    another launcher has started where they are ``adopted``."""
    found = refused(values, processes)
    here = [f" (here: {value})" if (value := each.value(values)) else "" for each in found]
    if len(found) == 1:
        raise UserError(
            f"{found[0].flag} is not supported with --deadpool yet{here[0]}: {found[0].because}; leave it out, or "
            "run without --deadpool"
        )
    if found:
        said = ", ".join(each.flag + value for each, value in zip(found, here, strict=True))
        raise UserError(f"{said} are not supported with --deadpool yet; leave them out, or run without --deadpool")
    if adopted and waits_for_nodes(values, processes):
        raise UserError(
            "--moe-token-dispatcher-type flex with experts that span nodes needs workers that a recovery can start "
            "anew, and another launcher has started these: use deadpool launch"
        )


def not_looked_at(words: Iterable[str]) -> list[str]:
    """The flags of a command line of which nobody has judged what a recovery must do about them; of a script of one's
    own, or of Megatron."""
    return _not_among(_names(judged_only=True), words)


def not_megatrons(words: Iterable[str]) -> dict[str, str]:
    """The flags of a command line that no version of Megatron has that is supported, each with the most like it or
    with an empty text."""
    names = _names(judged_only=False)
    known = sorted({name for name in names if not name.endswith("*")} | {each.flag.split()[0] for each in FEATURES})
    return {flag: "".join(difflib.get_close_matches(flag, known, 1)) for flag in _not_among(names, words)}


def _names(judged_only: bool) -> set[str]:
    """What judged.txt has."""
    text = Path(__file__).with_name("judged.txt").read_text()
    if judged_only:
        text = text.partition(UNJUDGED)[0]
    return {word for line in text.splitlines() if not line.startswith("#") for word in line.split()}


def _not_among(judged: set[str], words: Iterable[str]) -> list[str]:
    prefixes = tuple(word[:-1] for word in judged if word.endswith("*"))
    known = {each.attribute for each in FEATURES}
    flags = dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--"))
    return [
        flag
        for flag in flags
        if flag not in judged and not flag.startswith(("--deadpool", *prefixes)) and attribute_of(flag) not in known
    ]


def not_on_a_gpu(values: Values, processes: int) -> list[str]:
    """Names of the accepted features in use (of a job that runs) that have not been run on a GPU."""
    return [each.name for each in used(values, processes) if each.evidence in (Evidence.EMULATION, Evidence.SOURCES)]


def table(recorded: Mapping[str, Sequence[str]], features: Iterable[Feature] = FEATURES) -> str:
    """Both tables of docs/support.md, in Markdown.

    Args:
        recorded: by name of a feature, the tests in which a node was lost with it and the run ended equal.
    """
    accepted = ["| feature | flag | accepted | kill on the emulation | GPU |", "|---|---|---|---|---|"]
    refused = ["| flag | why not yet |", "|---|---|"]
    for each in features:
        if each.evidence is Evidence.REFUSED:
            refused.append(f"| `{each.flag}` | {each.because} |")
            continue
        tests = recorded.get(each.name, ())
        killed = f"{len(tests)}: {', '.join(_files(tests))}" if tests else "no"
        reasoned = f", {each.evidence}: {each.because}" if each.evidence is Evidence.SOURCES else ""
        on_gpu = "yes" if each.evidence is Evidence.GPU else "no"
        accepted.append(f"| {each.name} | `{each.flag}` | yes{reasoned} | {killed} | {on_gpu} |")
    return "\n".join(accepted) + "\n\n## Refused\n\n" + "\n".join(refused) + "\n"


def _files(tests: Iterable[str]) -> list[str]:
    return [f"`{name}`" for name in sorted({Path(test.partition("::")[0]).name for test in tests})]
