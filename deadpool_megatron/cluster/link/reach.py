"""Who can be reached. Asked by who has lost the coordinator or an agent, or comes back and looks for its job."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

CONNECT_S: Final = 1.0
_LOOK_S: Final = 0.2
_AGAIN_S: Final = 0.002
# No descriptor, memory or port was left here: nobody has been asked.
_OWN: Final = {
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EADDRNOTAVAIL,
}  # fmt: skip


def reached(places: Sequence[tuple[str, int]]) -> int:
    """How many of these places take a connection, or do so for all we know: what is short here says nothing of them.

    Blocks for two seconds at most.
    """
    answers: list[bool] = []

    def ask(place: tuple[str, int]) -> None:
        try:
            socket.create_connection(place, CONNECT_S).close()
        except OSError as err:
            if err.errno not in _OWN:
                return
        answers.append(True)

    threads = [threading.Thread(target=ask, args=(place,), daemon=True) for place in places]
    begun = 0
    try:
        for thread in threads:
            thread.start()
            begun += 1
    except RuntimeError:  # no thread was left
        answers += [True] * (len(threads) - begun)
    for thread in threads[:begun]:
        thread.join(2 * CONNECT_S)
    return len(answers)


def until_refused(place: tuple[str, int], stopped: threading.Event, said: Callable[[], None]) -> bool:
    """Whether nobody listens there any more: waits until that is so, or it is ``stopped``.

    Holds a connection, which ends with the process that has taken it, perhaps just before its port is closed. What
    cannot be asked, or does not answer, is no refusal. Calls ``said`` when a word has come. Blocks for a second after
    it is stopped, at most.
    """
    pause = _AGAIN_S
    while not stopped.is_set():
        try:
            with socket.create_connection(place, CONNECT_S) as held:
                pause = _AGAIN_S
                held.settimeout(_LOOK_S)
                while not stopped.is_set():
                    with suppress(TimeoutError):
                        if not held.recv(1024):
                            break
                        said()
        except ConnectionRefusedError:
            return not stopped.is_set()
        except OSError:
            pass
        stopped.wait(pause)
        pause = min(2 * pause, _LOOK_S)
    return False
