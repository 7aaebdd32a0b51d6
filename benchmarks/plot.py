"""Draws benchmark rows: how many times as fast as torch.roll each provider is."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_COLOURS = {
    "latent-shift": "#0b6e4f",
    "latent-shift+fused": "#52b788",
    "tsm": "#c9ced6",
    "roll+compile": "#8d99ae",
    "tsm+compile": "#5c677d",
}
_OTHERS = ("#b08968", "#7f5539", "#a98467", "#e6ccb2")  # parts of an operator, and peers
_LOSS = "#c1121f"


def draw_speedups(rows: list[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """Draws one panel per operator, pass and layout; bars left of 1 are losses, in red.

    Args:
        rows: Of one device.
        where: The environment they were measured in.
        path: The PNG to write; of several dtypes, caches or launches one each, named after it.

    Raises:
        ValueError: No provider was timed beside roll.
    """
    rows = [row for row in rows if row["speedup_vs_roll"] is not None and row["provider"] != "roll"]
    if not rows:
        raise ValueError("nothing to draw: no provider was timed beside roll")
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = _unique(map(_kind, rows))
    for kind in kinds:
        name = path if len(kinds) == 1 else path.with_stem("_".join((path.stem, *kind)))
        _draw([row for row in rows if _kind(row) == kind], kind, where, name)


def _kind(row: dict[str, Any]) -> tuple[str, ...]:
    return row["dtype"], row["cache"], row["launch"]


def _draw(
    rows: list[dict[str, Any]], kind: tuple[str, ...], where: dict[str, Any], path: Path
) -> None:
    dtype, cache, launch = kind
    how = ", in a CUDA graph" if launch == "graph" else ""
    ops = _unique(row["op"] for row in rows)
    columns = _unique((row["pass"], row["layout"]) for row in rows)
    named = _unique(row["provider"] for row in rows)
    others = zip((n for n in named if n not in _COLOURS), cycle(_OTHERS), strict=False)
    colours = {name: _COLOURS[name] for name in _COLOURS if name in named} | dict(others)
    slots = _slots(rows, list(colours))
    bottom = max(slots.values())
    figure, axes = plt.subplots(
        len(ops),
        len(columns),
        figsize=(2.2 + 2.4 * len(columns), 1.2 + len(ops) * max(1.5, 0.3 + 0.14 * bottom)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for i, op in enumerate(ops):
        for j, (direction, layout) in enumerate(columns):
            ax = axes[i][j]
            here = [r for r in rows if (r["op"], r["pass"], r["layout"]) == (op, direction, layout)]
            _panel(ax, here, slots, colours)
            ax.set_ylim(bottom + 1, -1)
            if i == 0:
                ax.set_title(f"{direction}, {layout}", fontsize=9)
            if j == 0:
                label = op.replace("+", "\n+ ").replace("_group", "_\ngroup")
                label = label.replace("_conv", "_\nconv")
                ax.set_ylabel(label, fontsize=8, fontweight="bold")
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    handles.append(Patch(color=_LOSS, label="slower than roll"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(
        f"Times as fast as torch.roll, {dtype}, {cache} cache{how}\n"
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _slots(rows: list[dict[str, Any]], providers: list[str]) -> dict[tuple[str, str], float]:
    """Site and provider -> height in a panel, one unit a bar and one between sites."""
    slots: dict[tuple[str, str], float] = {}
    y = 0
    for site in _unique(_site(row) for row in rows):
        timed = {row["provider"] for row in rows if _site(row) == site}
        for provider in providers:
            if provider in timed:
                slots[site, provider] = y
                y += 1
        y += 1
    return slots


def _panel(
    ax: Axes,
    rows: list[dict[str, Any]],
    slots: dict[tuple[str, str], float],
    colours: dict[str, str],
) -> None:
    for row in rows:
        speedup = row["speedup_vs_roll"]
        y = slots[_site(row), row["provider"]]
        colour = colours[row["provider"]] if speedup >= 1 else _LOSS
        ours = row["provider"] == "latent-shift"
        ax.barh(y, speedup - 1, 0.85, left=1, color=colour)
        ax.annotate(
            f"{speedup:.1f}" if speedup >= 1 else f"{speedup:.2f}",
            (max(speedup, 1), y),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            fontsize=6.5,
            fontweight="bold" if ours else "normal",
            color=colour if ours or speedup < 1 else "#444444",
        )
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(2))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    middles: dict[str, list[float]] = {}
    for (site, _), y in slots.items():
        middles.setdefault(site, []).append(y)
    ax.set_yticks([sum(ys) / len(ys) for ys in middles.values()], list(middles), fontsize=7)
    ax.tick_params(axis="x", labelsize=7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _site(row: dict[str, Any]) -> str:
    return f"{row['site']}\n{row['shape'][0]} frames"


def _unique(values: Any) -> list:
    return list(dict.fromkeys(values))
