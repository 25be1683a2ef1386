"""Stands in for the bench's work in its child. It imports no torch, so that it starts at once."""

import os
import time


def misbehaving(number, ceiling, seconds, chosen):
    """Crashes at number 1, hangs at 2, raises at 3."""
    print("compilers chatter on stdout, too", flush=True)
    if number == 1:
        os._exit(3)
    if number == 2:
        time.sleep(60)
    if number == 3:
        raise RuntimeError("an illegal memory access was encountered\nand a long story")
    return {"number": number, "process": os.getpid()}
