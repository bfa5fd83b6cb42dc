"""Who can be reached. Asked by who has lost the coordinator, or comes back and looks for its job."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Sequence
from typing import Final

CONNECT_S: Final = 1.0
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
