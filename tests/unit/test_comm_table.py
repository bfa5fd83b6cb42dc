"""The table of groups: equal on ranks that made the same groups, whatever their part in them."""

from datetime import timedelta
from typing import Any

from deadpool_megatron.comm.table import GroupRecord, GroupTable


def record(
    name: str, ranks: tuple[int, ...], desc: str = "tp", backend: str = "gloo", group: Any = None
) -> GroupRecord:
    return GroupRecord(name, ranks, desc, backend, {"cpu": backend}, timedelta(seconds=1), group=group)


def table(*records: GroupRecord) -> GroupTable:
    made = GroupTable()
    for each in records:
        made.add(each)
    return made


def test_digest_does_not_depend_on_membership() -> None:
    inside = table(record("0", (0, 1), group=object()), record("1", (0,), group=object()))
    outside = table(record("0", (0, 1), group=object()), record("1", (0,)))
    assert inside.digest() == outside.digest()


def test_digest_sees_order_ranks_description_and_backend() -> None:
    base = table(record("0", (0, 1)), record("1", (0,)))
    others = [
        table(record("1", (0,)), record("0", (0, 1))),
        table(record("0", (1, 0)), record("1", (0,))),
        table(record("0", (0, 1), desc="dp"), record("1", (0,))),
        table(record("0", (0, 1), backend="nccl"), record("1", (0,))),
        table(record("0", (0, 1))),
    ]
    assert all(other.digest() != base.digest() for other in others)


def test_groups_only_their_members_know_of_are_not_in_the_digest() -> None:
    local = "0123456789abcdef0123456789abcdef01234567"  # torch's name with use_local_synchronization
    assert table(record("0", (0, 1)), record(local, (0,))).digest() == table(record("0", (0, 1))).digest()


def test_a_group_torch_hands_out_twice_is_one_record() -> None:
    group = object()
    assert len(table(record("0", (0,), group=group), record("0", (0,), group=group)).records) == 1


def test_destroyed_groups_are_not_re_formed() -> None:
    alive, destroyed = object(), object()
    made = table(record("0", (0,), group=alive), record("1", (0,), group=destroyed), record("2", (1,)))
    assert [r.name for r in made.members({alive})] == ["0"]
