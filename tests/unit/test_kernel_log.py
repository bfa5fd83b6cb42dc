"""Xids are read out of the kernel's log as the driver writes them, and nothing that is wrong with it matters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deadpool_megatron.cluster.agent import kernel_log
from deadpool_megatron.cluster.agent.kernel_log import KernelLog, Xid, parse


@pytest.mark.parametrize(
    ("line", "xid"),
    [
        (
            "3,1203,98237423,-;NVRM: Xid (PCI:0000:5a:00): 79, pid='<unknown>', GPU has fallen off the bus.",
            (79, "0000:5a:00", 0),
        ),
        ("[ 966.5] NVRM: Xid (0000:01:00): 31, Ch 0000000b, engmask 00000120", (31, "0000:01:00", 0)),
        (
            "NVRM: Xid (PCI:0018:01:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 00 (0x025001c6 0x00000000)",
            (149, "0018:01:00", 0),
        ),
        ("NVRM: Xid (PCI:0018:01:00): 45, pid=7, channel 0x2 caused by previous Xid 145", (45, "0018:01:00", 145)),
        ("NVRM: Xid (PCI:0018:01:00): 63", (63, "0018:01:00", 0)),
        ("NVRM: GPU at PCI:0000:5a:00: GPU-b850f46d", None),
        ("eth0: link is down", None),
    ],
)
def test_lines_of_the_driver(line: str, xid: tuple[int, str, int] | None) -> None:
    found = parse(line)
    assert (None if found is None else (found.xid, found.device, found.after)) == xid


def test_what_comes_is_read_once_and_never_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "kmsg"
    os.mkfifo(fifo)
    log = KernelLog(str(fifo))
    writer = os.open(fifo, os.O_WRONLY)
    assert log.read() == []
    line = b"3,1,2,-;NVRM: Xid (PCI:0000:5a:00): 119, Timeout after 6s of waiting for RPC response\n"
    os.write(writer, line + b"6,2,3,-;something else \xff\n" + line + line.replace(b"5a", b"5b"))
    assert [(xid.xid, xid.device) for xid in log.read()] == [(119, "0000:5a:00"), (119, "0000:5b:00")]
    os.write(writer, line)
    assert log.read() == [], "the driver repeats it"
    monkeypatch.setattr(kernel_log, "_AGAIN_S", 0.0)
    os.write(writer, line)
    assert log.read() == [Xid(119, "0000:5a:00", "Timeout after 6s of waiting for RPC response", 0)]
    os.close(writer)
    assert log.read() == [] and log.fd is None, "it is gone"
    log.close()


def test_a_log_that_cannot_be_read_is_done_without(tmp_path: Path) -> None:
    log = KernelLog(str(tmp_path / "nowhere"))
    assert log.fd is None and log.read() == []
    log.close()


def test_records_that_were_overwritten_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kmsg"
    file.touch()
    log = KernelLog(str(file))
    answers = [BrokenPipeError(), b"NVRM: Xid (PCI:0000:5a:00): 48, DBE\n", BlockingIOError()]

    def read(fd: int, count: int) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(os, "read", read)
    assert [xid.xid for xid in log.read()] == [48] and log.fd is not None
    monkeypatch.undo()
    log.close()
