"""``torchft_lighthouse.py``: torchft's lighthouse on this machine, until its standard input ends.

In the place of torchft's own command because that one does not tell which free port it has taken. Prints the port.
"""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    """Serve; times are milliseconds."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("min-replicas", "join-timeout", "quorum-tick", "heartbeat-timeout"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=options.min_replicas,
        join_timeout_ms=options.join_timeout,
        quorum_tick_ms=options.quorum_tick,
        heartbeat_timeout_ms=options.heartbeat_timeout,
    )
    print(server.address().rpartition(":")[2], flush=True)  # the address has the machine's name, not the one bound
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main()
