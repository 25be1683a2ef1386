"""Stands in for the bench's work in its child. It imports no torch, so that it starts at once."""

import os
import time


class Numbered(int):
    """A case that knows its number only."""

    def row(self, impl):
        return {"number": int(self), "impl": impl}


def misbehaving(case, name, *settings):
    """Crashes at number 1, hangs at 2, raises at 3."""
    print("compilers chatter on stdout, too", flush=True)
    if case == 1:
        os._exit(3)
    if case == 2:
        time.sleep(60)
    if case == 3:
        raise RuntimeError("an illegal memory access was encountered\nand a long story")
    return case.row(name) | {"process": os.getpid()}
