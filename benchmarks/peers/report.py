"""Figures for reading: a table on the terminal, the generated part of docs/evidence/benchmarks.md, and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.results import EXACT, Row, disagreement, gaps, mean_loss, rows

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
PAGE, PLOT = EVIDENCE / "benchmarks.md", EVIDENCE / "benchmarks.svg"
BEGIN, END = "<!-- generated: benchmarks begin -->", "<!-- generated: benchmarks end -->"
HEAD = ("side", "seconds", "pairs/s", "speed", "peak GB", "process GB", "")
COLOURS = {"mlxdpo": "#0b6e4f", "mlx-lm-lora": "#d17a22", "soup-cli": "#a23b72", "trl": "#5b6c8f"}


def cells(row: Row) -> tuple[str, ...]:
    """A row as text. Speed is relative to ours: 1.00x is as fast, 0.50x takes twice as long."""
    seconds = _number(row.seconds, row.low, row.high, ".2f")
    speed = _number(row.ratio, row.ratio_low, row.ratio_high, ".2f", "x")
    pairs, peak, rss = (f"{v:.3g}" if v else "-" for v in (row.pairs_per_second, row.peak_gb, row.rss_gb))
    return row.side, seconds, pairs, speed, peak, rss, row.trouble


def title(name: str, workload: dict[str, Any]) -> str:
    """What was measured, how well the sides agree, and which peer was the fastest."""
    void, (against, off) = disagreement(workload), gaps(workload)
    if void:
        agree = f"VOID: {void}"
    elif against == EXACT:
        agree = "losses against float64: " + ", ".join(f"{n} {gap:.0e}" for n, gap in off.items())
    elif workload["same"]:
        agree = f"losses agree to {max(off.values(), default=0.0):.0e}"
    else:
        means = ", ".join(f"{n} {mean_loss(s):.4f}" for n, s in workload["sides"].items() if s["pairs"])
        agree = f"each side in its own batches; mean loss {means}"
    peers = [row for row in rows(workload) if row.seconds and not row.side.startswith("mlxdpo")]
    fastest = f"; fastest peer: {min(peers, key=lambda row: row.seconds or 0).side}" if peers and not void else ""
    return f"{name}: {workload['what']}, {workload['shape']}; {agree}{fastest}"


def table(results: dict[str, Any]) -> str:
    """Everything as plain text."""
    blocks = []
    for name, workload in results["workloads"].items():
        lines = [HEAD, *map(cells, rows(workload))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        blocks.append("\n".join([title(name, workload), *text]))
    return "\n\n".join(blocks)


def markdown(results: dict[str, Any]) -> str:
    """Everything as Markdown, with machine and versions."""
    parts = [f"![pairs per second and memory]({PLOT.name})"] if any_figure(results) else []
    for name, workload in results["workloads"].items():
        lines = [HEAD, ("---",) * len(HEAD), *map(cells, rows(workload))]
        text = "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
        parts.append(f"### {name}\n\n{title(name, workload).partition(': ')[2]}.\n\n{text}")
        parts.append(_circumstances(workload))
    return "\n\n".join(parts)


def _circumstances(workload: dict[str, Any]) -> str:
    versions: dict[str, str] = {}
    for side in workload["sides"].values():
        versions |= side["versions"]
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    notes = sorted({f"{name.split(':')[0]}: {n}" for name, s in workload["sides"].items() for n in s["notes"]})
    text = f"{workload['machine']}; {named}; {workload['date']}."
    return text + (f" {'; '.join(notes)}." if notes else "")


def write_page(results: dict[str, Any], page: Path = PAGE) -> None:
    """Replace what stands between the markers. Raises `ValueError` for a page without them."""
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: expected one `{BEGIN}` and one `{END}`")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{rest.split(END)[1]}", "utf-8")


def any_figure(results: dict[str, Any]) -> bool:
    """Whether there is anything to draw."""
    return any(row.seconds for workload in results["workloads"].values() for row in rows(workload))


def write_plot(results: dict[str, Any], file: Path = PLOT) -> None:
    """Bars of pairs per second and of memory, a group for each workload, a bar for each trainer.

    Of a trainer's rows the plain one is drawn, or the checkpointed one where only that ran; ablations are not.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, workload in results["workloads"].items() if any(r.seconds for r in rows(workload))]
    figure, axes = pyplot.subplots(2, len(names), figsize=(2.2 * len(names) + 1, 4.6), squeeze=False)
    for column, name in zip(axes.T, names, strict=True):
        drawn = bars(results["workloads"][name])
        for axis, field in zip(column, (lambda r: r.pairs_per_second or 0.0, memory), strict=True):
            values = [field(row) for row in drawn]
            made = axis.bar(range(len(drawn)), values, color=[COLOURS[r.side.split(":")[0]] for r in drawn])
            labels = [f"{v:.2g}" if r.seconds else "failed" for v, r in zip(values, drawn, strict=True)]
            axis.bar_label(made, labels, fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.margins(y=0.15)
        column[0].set_title(name, fontsize=9)
    axes[0][0].set_ylabel("pairs per second", fontsize=8)
    axes[1][0].set_ylabel("memory of the process, GB", fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="lower center", ncols=len(COLOURS), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def memory(row: Row) -> float:
    """GB a trainer needed, by the same measure for all: the process, or MLX's own count where that is larger.

    It can be on Metal, whose buffers a process's figure may leave out.
    """
    return max(row.peak_gb or 0.0, row.rss_gb or 0.0)


def bars(workload: dict[str, Any]) -> list[Row]:
    """One row for each trainer, ours first."""
    by_name = {row.side: row for row in rows(workload)}
    found = []
    for trainer in COLOURS:
        own = [by_name[n] for n in (trainer, f"{trainer}:checkpoint") if n in by_name]
        found += [next((row for row in own if row.seconds), own[0])] if own else []
    return found


def _number(value: float | None, low: float | None, high: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return "-"
    spread = f" ({low:{form}}-{high:{form}})" if low is not None and high is not None else ""
    return f"{value:{form}}{unit}{spread}"
