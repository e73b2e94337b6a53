"""Panels of cost against size, with the slope that it would have if it were ideal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_slope(
    axes: "Axes",
    sizes: Sequence[float],
    seconds: Sequence[float],
    ideal_seconds: Sequence[float],
    name: str,
    base: int,
) -> None:
    """Measured points, and the ideal ones, which `name` says, on logarithmic axes to `base`."""
    axes.plot(sizes, seconds, color="black", marker="o", label="measured")
    axes.plot(sizes, ideal_seconds, color="0.45", linestyle=(0, (5, 1.5)), label=f"ideal: {name}")
    axes.set_yscale("log", base=base)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    finish(axes, sizes, base)


def finish(axes: "Axes", sizes: Sequence[float], base: int) -> None:
    """A logarithmic axis of sizes with a tick each, grid, legend, and no frame."""
    axes.set_xscale("log", base=base)
    axes.set_xticks(sizes, [f"{size:,.4g}" for size in sizes])
    axes.minorticks_off()
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
