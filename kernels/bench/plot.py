"""The bench's results as a picture: share of the measured ceiling, ours and each peer's."""

COLORS = {"triton": "#d62728", "torch": "#7f7f7f", "compiled": "#bcbd22"}


def plot(results, path):
    """A panel per operation and phase, a group of bars per shape, a bar per implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {}  # (op, phase) -> implementation -> (model, shape) -> share
    for row in results["rows"]:
        if "us" in row:
            bars = panels.setdefault((row["op"], row["phase"]), {}).setdefault(row["impl"], {})
            bars[f"{row['model']}\n{row['shape']}"] = 100 * row["share"]
    size, height = (11, 2.6 * len(panels) + 0.4), max(1, len(panels))
    figure, axes = plt.subplots(height, figsize=size, layout="constrained", squeeze=False)
    for axis, ((op, phase), impls) in zip(axes[:, 0], panels.items()):
        shapes = list(dict.fromkeys(shape for bars in impls.values() for shape in bars))
        width = 0.8 / len(impls)
        for i, (impl, bars) in enumerate(impls.items()):
            at = [shapes.index(shape) + width * (i + 0.5) - 0.4 for shape in bars]
            axis.bar(at, bars.values(), width, label=impl, color=COLORS.get(impl))
        axis.set_title(f"{op}, {phase}: % of the ceiling", loc="left", fontsize=10)
        axis.set_xticks(range(len(shapes)), shapes, fontsize=5)
        axis.legend(fontsize=6, ncols=len(impls), loc="upper right")
        axis.spines[["top", "right"]].set_visible(False)
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}, {machine['date']}", size=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
