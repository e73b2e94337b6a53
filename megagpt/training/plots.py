"""The loss curve of a run as a picture."""

from pathlib import Path

from megagpt.training.metrics import read_metrics


def plot_losses(run_dir: Path, baselines: dict[str, float] | None = None) -> Path:
    """Draw training and validation loss by step from run_dir/metrics.jsonl into run_dir/loss.png; returns its path.

    baselines: losses of other models by name, drawn as dashed lines.
    """
    from matplotlib.figure import Figure  # the object interface: no global state, no display needed

    records = list(read_metrics(run_dir / "metrics.jsonl"))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="optimizer step", ylabel="cross-entropy, nats a token", title=f"Loss of {run_dir.name}"
    )
    training = [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    axes.plot(*zip(*training, strict=True), color="0.6", linewidth=1, label="training, one batch each")
    names = sorted({record["dataset"] for record in records if record["kind"] == "validation"})
    for number, name in enumerate(names):
        points = [(record["step"], record["loss"]) for record in records if record.get("dataset") == name]
        (line,) = axes.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", markersize=4, label=name)
        last_step, last_loss = points[-1]
        axes.annotate(
            f"{last_loss:.3f}", (last_step, last_loss), xytext=(0, 7), textcoords="offset points", ha="right",
            color=line.get_color(),
        )  # fmt: skip
    for name, loss in (baselines or {}).items():
        axes.axhline(loss, color="0.3", linewidth=1, linestyle="--", label=f"{name} ({loss:.3f})")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=150)
    return path
