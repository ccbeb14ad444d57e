"""Plain-text tables and numbers for people."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first one to the left, the others to the right. Rows may differ in length."""
    width = max(map(len, rows))
    sizes = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(width)]
    lines = []
    for row in rows:
        cells = [cell.rjust(size) if i else cell.ljust(size) for i, (cell, size) in enumerate(zip(row, sizes))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same as a table in Markdown; the first row is its header."""
    header, *cells = rows
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def megabytes(count: int) -> str:
    """Bytes as decimal megabytes, with three significant digits or so."""
    value = count / 1e6
    return f"{value:,.0f} MB" if value >= 100 else f"{value:.1f} MB" if value >= 10 else f"{value:.2f} MB"


def percent(fraction: float) -> str:
    """0.1 -> "10 %", 0.1276 -> "12.8 %"."""
    return f"{100 * fraction:.3g} %" if fraction < 0.1 else f"{round(100 * fraction, 1):g} %"


def gib(count: int | None) -> str:
    """Bytes as binary gigabytes without the unit, "?" for none."""
    value = 0.0 if count is None else count / 2**30
    return "?" if count is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
