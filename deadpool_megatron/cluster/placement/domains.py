"""Failure domains: which rack, switch or power supply each node hangs on, from a flag, a file or Slurm.

On the command line ``0-3=r1,4-7=r2`` names racks. A YAML file may name any kinds::

    rack:   {r1: 0-3, r2: 4-7}
    power:  {p1: "0,1,4,5", p2: [2, 3, 6, 7]}

Nodes are numbered as everywhere, spares included; a node that is not named is in no domain.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from deadpool_megatron.yaml_file import NotRead, read_yaml

Labels = dict[int, dict[str, str]]
NVLINK: Final = "nvlink"
"""The kind of domain whose nodes reach each other's GPUs over NVLink. They may fail together too."""
_MOST_NAMED: Final = 12
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,30}")


def parse_domains(text: str, nodes: int | None = None, nvlink: str = "") -> Labels:
    """By node its labels by kind. Raises ValueError in one clear line.

    Args:
        text: what ``--deadpool-domains`` got.
        nodes: how many the job has, spares included, where that is known.
        nvlink: what ``--deadpool-nvlink-domains`` got, in the same forms; a file names the one kind ``nvlink``.
    """
    labels = _read(text, "rack")
    for node, of_node in _read(nvlink, NVLINK).items():
        if set(of_node) != {NVLINK}:
            raise ValueError(f"NVLink domains {nvlink}: the only kind here is {NVLINK}, as in {NVLINK}: {{n1: 0-15}}")
        _put(labels, node, NVLINK, of_node[NVLINK], nvlink)
    if nodes is not None and (stray := [node for node in labels if node >= nodes]):
        raise ValueError(f"failure domains: there is no node {min(stray)}: the job has nodes 0 to {nodes - 1}")
    return labels


def _read(text: str, kind: str) -> Labels:
    return _inline(text, kind) if "=" in text else _file(text) if text else {}


def _file(text: str) -> Labels:
    try:
        data = read_yaml(text)
    except NotRead as err:
        raise ValueError(f"failure domains {text}: {err}; give a YAML file, or 0-3=rack1,4-7=rack2") from None
    if not isinstance(data, dict) or not all(isinstance(labels, dict) for labels in data.values()):
        raise ValueError(
            f"failure domains {text}: expected kinds, each with labels and their nodes, as in rack: {{r1: 0-3}}"
        )
    out: Labels = {}
    for kind, labels in data.items():
        if not isinstance(kind, str) or not _KIND.fullmatch(kind):
            raise ValueError(f"failure domains {text}: {kind!r} is not the name of a kind, as rack or power")
        for label, nodes in labels.items():
            for node in _nodes(nodes, f"failure domains {text}: {kind}: {label}"):
                _put(out, node, kind, str(label), text)
    return out


def _inline(text: str, kind: str) -> Labels:
    out: Labels = {}
    for part in text.split(","):
        nodes, _, label = part.partition("=")
        if not label.strip():
            raise ValueError(f"failure domains: {part!r} is not of the form NODES=NAME, as in 0-3=r1")
        for node in _nodes(nodes, "failure domains"):
            _put(out, node, kind, label.strip(), part)
    return out


def _put(out: Labels, node: int, kind: str, label: str, where: str) -> None:
    if out.setdefault(node, {}).setdefault(kind, label) != label:
        raise ValueError(f"failure domains {where}: node {node} is in {kind} {out[node][kind]} and in {kind} {label}")


def _nodes(value: Any, where: str) -> list[int]:
    """``3``, ``0-3``, ``0-3,8`` or a list of those."""
    items = value if isinstance(value, list) else str(value).split(",")
    out: list[int] = []
    for item in items:
        found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", str(item).strip())
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise ValueError(f"{where}: {item!r} is not a node or a range of nodes, as in 0-3")
        out += range(int(found[1]), int(found[2] or found[1]) + 1)
    return out


def covered(labels: Mapping[int, Mapping[str, str]], trains: Collection[int], spares: Collection[int]) -> list[str]:
    """How many losses of each domain a spare of the same domain covers: a sentence for each kind, NVLink's first.

    Args:
        trains: the nodes that hold coordinates.
        spares: those that may take over.
    """
    by_kind: dict[str, dict[str, list[int]]] = {}
    for node, of_node in sorted(labels.items()):
        for kind, name in of_node.items():
            counts = by_kind.setdefault(kind, {}).setdefault(name, [0, 0])
            counts[0] += node in trains
            counts[1] += node in spares
    sentences = []
    for kind in sorted(by_kind, key=lambda kind: (kind != NVLINK, kind)):
        losses = {name: min(counts) for name, counts in by_kind[kind].items() if counts[0]}
        some = [f"{name} {count}" for name, count in losses.items() if count]
        none = [name for name, count in losses.items() if not count]
        some = [*some[:_MOST_NAMED], *(["..."] if len(some) > _MOST_NAMED else [])]
        without = ", ".join([*none[:_MOST_NAMED], *(["..."] if len(none) > _MOST_NAMED else [])])
        if losses:
            words = [*some, *([f"none of {without}"] if none else [])]
            sentences.append(f"losses that spares of the same {kind} domain cover: {', '.join(words)}")
    return sentences


def whole(
    labels: Mapping[int, Mapping[str, str]],
    trains: Collection[int],
    spares: Collection[int],
    uncopied: Mapping[str, Collection[str]],
) -> list[str]:
    """Which domains may be lost as a whole, their spares with them: a sentence for each kind of two domains or more.

    Args:
        trains, spares: as of `covered`.
        uncopied: by kind, the domains without which some shard has no copy left.
    """
    by_kind: dict[str, dict[str, set[int]]] = {}
    for node, of_node in labels.items():
        for kind, name in of_node.items():
            by_kind.setdefault(kind, {}).setdefault(name, set()).add(node)
    sentences = []
    for kind in sorted(by_kind, key=lambda kind: (kind != NVLINK, kind)):
        may, must_not = [], []
        domains = {name: inside for name, inside in sorted(by_kind[kind].items()) if inside & {*trains}}
        for name, inside in domains.items():
            needed, there = len(inside & {*trains}), len({*spares} - inside)
            if name in uncopied.get(kind, ()):
                must_not.append(f"{name} (its shards have no copy elsewhere)")
            elif needed > there:
                must_not.append(f"{name} ({needed} nodes, {there} spares elsewhere)")
            else:
                may.append(name)
        if len(domains) > 1:
            words = [*_few(may), *([f"not {', '.join(_few(must_not))}"] if must_not else [])]
            sentences.append(f"a whole {kind} lost at once, its spares too: {'; '.join(words)}")
    return sentences


def _few(names: list[str]) -> list[str]:
    return [", ".join([*names[:_MOST_NAMED], *(["..."] if len(names) > _MOST_NAMED else [])])] if names else []


def slurm_labels(environ: Mapping[str, str]) -> dict[str, str]:
    """The labels of the node this runs on, from Slurm's topology plugin (topology/tree); empty without one.

    ``SLURM_TOPOLOGY_ADDR`` has the names of the switches from the top of the network down to the node, separated by
    dots, and ``SLURM_TOPOLOGY_ADDR_PATTERN`` says what each is. The switch next to the node is ``switch``, those above
    it are ``switch2``, ``switch3`` and so on; names hold from the top down, since two switches may share one.
    """
    names = environ.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    kinds = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    if len(names) != len(kinds):
        return {}
    switches = [i for i, kind in enumerate(kinds) if kind == "switch" and names[i]]
    return {
        "switch" if up == 0 else f"switch{up + 1}": ".".join(names[: i + 1]) for up, i in enumerate(reversed(switches))
    }
