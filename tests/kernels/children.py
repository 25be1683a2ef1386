"""Stand-ins for the bench's measuring child. They import no torch, so that they start at once."""

import os
import sys
import time


def crashing(pipe, first, ceiling):
    """Crashes at number 1, hangs at 2, and ends behind 3."""
    print("compilers chatter on stdout, too", flush=True)
    assert (ceiling is None) == (first == 0)
    if first == 0:
        pipe.send(("ceilings", {"copy": 1.0, "matmul": 2.0}))
    for i in range(first, 5):
        pipe.send(("start", i))
        if i == 1:
            os._exit(3)
        if i == 2:
            time.sleep(60)
        pipe.send(("row", {"i": i}))
        if i == 3:
            sys.exit("an illegal memory access was encountered")


def without_driver(pipe, first, ceiling):
    sys.exit("no driver")
