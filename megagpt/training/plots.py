"""The loss curve of a run as a picture."""

from pathlib import Path

from megagpt.training.metrics import read_metrics


def plot_losses(run_dir: Path) -> Path:
    """Draw training and validation loss by step from run_dir/metrics.jsonl into run_dir/loss.png; returns its path."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display needed

    records = list(read_metrics(run_dir / "metrics.jsonl"))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="optimizer step", ylabel="cross-entropy, nats a token", title=f"Loss of {run_dir.name}"
    )
    training = [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1.2, label="training")
    for name in sorted({record["dataset"] for record in records if record["kind"] == "validation"}):
        points = [(record["step"], record["loss"]) for record in records if record.get("dataset") == name]
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        last_step, last_loss = points[-1]
        axes.annotate(
            f"{last_loss:.3f}", (last_step, last_loss), xytext=(0, 7), textcoords="offset points", ha="right",
            color=line.get_color(),
        )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=150)
    return path
