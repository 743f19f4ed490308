"""The report of tuning as a picture: for each kernel its time over the default's, a dot for each number of tokens."""

from __future__ import annotations

from html import escape

from whet.tune.report import TuningReport

LABELS, PLOT, ROW, MARGIN = 440, 520, 22, 40
COLOURS = ("#9ecae1", "#4292c6", "#08519c", "#08306b")
"""For few tokens to many."""
STEP = 0.05


def draw(report: TuningReport) -> str:
    """Return an SVG document. ValueError if there is no verdict to show."""
    gains = sorted(report.gains, key=lambda g: g.speedup, reverse=True)
    if not gains:
        raise ValueError("there is nothing to draw: no kernel has a verdict; run whet tune to its end")
    low = min(0.9, *(min(g.ratios) for g in gains)) - STEP / 2
    high = max(1.0, *(max(g.ratios) for g in gains)) + STEP / 2
    bottom = MARGIN + ROW * len(gains)

    def x(ratio: float) -> float:
        return LABELS + PLOT * (ratio - low) / (high - low)

    parts = []
    for step in range(round(low / STEP), round(high / STEP) + 1):
        if low <= step * STEP <= high:
            at, colour = x(step * STEP), "#000" if step * STEP == 1 else "#ccc"
            parts.append(f'<path d="M{at:.1f} {MARGIN}V{bottom}" stroke="{colour}"/>')
            parts.append(_text(at, bottom + 16, f"{step * STEP:.2f}", "middle"))
    for i, gain in enumerate(gains):
        y = MARGIN + ROW * (i + 0.5)
        parts.append(_text(LABELS - 12, y + 4, f"{gain.kernel}, {gain.isa}", "end"))
        parts.append(f'<path d="M{x(min(gain.ratios)):.1f} {y}H{x(max(gain.ratios)):.1f}" stroke="#888"/>')
        for ratio, tokens, colour in zip(gain.ratios, gain.tokens, COLOURS, strict=False):
            title = f"<title>{tokens} tokens: {ratio:.2f}</title>"
            parts.append(f'<circle cx="{x(ratio):.1f}" cy="{y}" r="5" fill="{colour}">{title}</circle>')
    most = max(gains, key=lambda g: len(g.tokens))
    for i, (tokens, colour) in enumerate(zip(most.tokens, COLOURS, strict=False)):
        at = LABELS + i * 110
        parts.append(
            f'<circle cx="{at}" cy="16" r="5" fill="{colour}"/>{_text(at + 10, 20, f"{tokens} tokens", "start")}'
        )
    title = f"Time of tuned kernels over their defaults\u2019; {report.speedup - 1:+.1%} on the whole"
    parts.append(_text(12, 20, title, "start"))
    width, height = LABELS + PLOT + MARGIN, bottom + MARGIN
    style = "font-family:sans-serif;font-size:12px"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{style}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
