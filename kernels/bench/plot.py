"""The bench's results as a picture: share of the measured ceiling, ours and each peer's."""

import os
import tempfile
from pathlib import Path

COLORS = {"triton": "#d62728", "torch": "#7f7f7f", "compiled": "#bcbd22"}


def plot(results, path):
    """A panel per operation and phase, a group of bars per shape, a bar per implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = [row for row in results["rows"] if "us" in row]
    panels = list(dict.fromkeys((row["op"], row["phase"]) for row in measured))
    if not panels:
        return
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 2.6 * len(panels)), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[:, 0], panels):
        own = [row for row in measured if (row["op"], row["phase"]) == panel]
        shapes = list(dict.fromkeys((row["model"], row["shape"]) for row in own))
        impls = list(dict.fromkeys(row["impl"] for row in own))
        for i, impl in enumerate(impls):
            bars = {(r["model"], r["shape"]): r["share"] for r in own if r["impl"] == impl}
            at = [n + 0.8 * (i + 0.5) / len(impls) - 0.4 for n, s in enumerate(shapes) if s in bars]
            heights = [100 * bars[s] for s in shapes if s in bars]
            axis.bar(at, heights, 0.8 / len(impls), label=impl, color=COLORS.get(impl))
        ceiling = {"matmul": "bf16 product", "copy": "copy"}[own[0]["bound"]]
        axis.set_title(f"{panel[0]}, {panel[1]}", loc="left", fontsize=10)
        axis.set_ylabel(f"% of {ceiling}", fontsize=8)
        axis.set_xticks(range(len(shapes)), [f"{m}\n{s}" for m, s in shapes], fontsize=5)
        axis.legend(fontsize=6, ncols=len(impls), loc="upper right")
        axis.spines[["top", "right"]].set_visible(False)
    machine = results["machine"]
    figure.suptitle(
        f"{machine['device']}, torch {machine['torch']}, {machine['date']}", fontsize=10
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(suffix=path.suffix or ".png", dir=path.parent)
    os.close(handle)
    figure.savefig(beside, dpi=150)
    plt.close(figure)
    os.replace(beside, path)
