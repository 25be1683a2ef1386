"""The bench's results as a picture: share of the measured ceiling, ours and each peer's."""

from io import BytesIO

COLORS = {"triton": "#d62728", "torch": "#7f7f7f", "compiled": "#bcbd22"}


def picture(results, suffix):
    """The file's bytes; suffix: ".png", ".svg" or ".pdf".

    A panel per operation and phase, a group of bars per shape, a bar per implementation.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {}  # (op, phase) -> implementation -> (model, shape) -> share
    for row in results["rows"]:
        if "us" in row:
            panel = panels.setdefault((row["op"], row["phase"]), {})
            panel.setdefault(row["impl"], {})[f"{row['model']}\n{row['shape']}"] = row["share"]
    height = max(1, len(panels))
    figure, axes = plt.subplots(
        height, 1, figsize=(11, 2.6 * height), layout="constrained", squeeze=False
    )
    for axis, ((op, phase), impls) in zip(axes[:, 0], panels.items()):
        shapes = list(dict.fromkeys(shape for bars in impls.values() for shape in bars))
        for i, (impl, bars) in enumerate(impls.items()):
            at = [shapes.index(shape) + 0.8 * (i + 0.5) / len(impls) - 0.4 for shape in bars]
            heights = [100 * share for share in bars.values()]
            axis.bar(at, heights, 0.8 / len(impls), label=impl, color=COLORS.get(impl))
        axis.set_title(f"{op}, {phase}", loc="left", fontsize=10)
        axis.set_ylabel("% of the ceiling", fontsize=8)
        axis.set_xticks(range(len(shapes)), shapes, fontsize=5)
        axis.legend(fontsize=6, ncols=len(impls), loc="upper right")
        axis.spines[["top", "right"]].set_visible(False)
    machine = results["machine"]
    figure.suptitle(
        f"{machine['device']}, torch {machine['torch']}, {machine['date']}", fontsize=10
    )
    file = BytesIO()
    figure.savefig(file, format=suffix.removeprefix(".") or "png", dpi=150)
    plt.close(figure)
    return file.getvalue()
