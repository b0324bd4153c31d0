"""Charts as SVG text: drawn in a millisecond, sharp at any size, and the same bytes wherever they are drawn.

Every text in them is escaped, so that they can stand in a page. Sizes are in pixels of a chart that is not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from loaders.words import shown

WIDTH = 760
FONT = 12  # pixels; a letter of the usual sans-serif fonts is at most LETTER wide on average
LETTER = 7.4
LONGEST = 48  # letters of a label; a longer one is shortened in its middle, and whole in its tooltip
ROW, TOP, BOTTOM, GAP = 34, 26, 40, 10
GRAY, BLUE = "#9a9a9a", "#2f6db3"
# Colors that are told apart by those who see fewer of them, too (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#5e3c99")
MANY_LAYERS = 32  # up to which a cell of a grid has its number in it


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a scatter chart: its name, its place, and the interval of y if there is one."""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None = None


def bars(rows: Sequence[tuple[str, float, float]], words: tuple[str, str], said: Callable[[float], str]) -> str:
    """Draw two bars for each label, such as sizes before and after; `words` names the two, `said` writes a value."""
    labels = [_short(label) for label, _, _ in rows]
    values = [said(value) for _, *both in rows for value in both]
    left, right = _width(labels) + GAP, _width(values) + GAP
    largest = max((value for _, *both in rows for value in both), default=0.0) or 1.0
    scale = (WIDTH - left - right) / largest
    drawn = [_legend([(words[0], GRAY), (words[1], BLUE)], left)]
    for index, (label, *both) in enumerate(rows):
        y = TOP + index * ROW
        drawn.append(_text(left - GAP / 2, y + ROW / 2, labels[index], "end", label))
        for half, (value, color) in enumerate(zip(both, (GRAY, BLUE), strict=True)):
            top, wide = y + 3 + half * 14, max(1.0, value * scale)
            drawn.append(f'<rect x="{left:.1f}" y="{top}" width="{wide:.1f}" height="12" fill="{color}"/>')
            drawn.append(_text(left + wide + 4, top + 6, said(value)))
    return _svg(WIDTH, TOP + len(rows) * ROW + 4, drawn)


def line(values: dict[int, float], x: str, y: str) -> str:
    """Draw values over whole numbers, such as errors over layers, from zero up."""
    frame = _Frame(
        (min(values), max(values)), (0.0, 1.1 * max(values.values()) or 1.0), x, y, height=240, whole=True, is_log=False
    )
    places = [(frame.x(at), frame.y(value)) for at, value in sorted(values.items())]
    path = " ".join(f"{at:.1f},{value:.1f}" for at, value in places)
    drawn = [*frame.drawn, f'<polyline points="{path}" fill="none" stroke="{BLUE}" stroke-width="1.5"/>']
    for (at, value), (px, py) in zip(sorted(values.items()), places, strict=True):
        drawn.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{BLUE}">{_title(f"{x} {at}: {value:.5f}")}</circle>'
        )
    return _svg(WIDTH, frame.height, drawn)


def scatter(points: Sequence[Point], front: Sequence[str], x: str, y: str) -> str:
    """Draw named points, a line through those of the front, and intervals where there are any."""
    ends = [end for point in points for end in (point.y, *(point.interval or ()))]
    is_log = min(ends) > 0 and max(ends) > 10 * min(ends)
    frame = _Frame(
        _wider([point.x for point in points]), (min(ends) / 1.3, max(ends) * 1.3) if is_log else (0.0, max(ends) * 1.1),
        x, y, height=380, whole=False, is_log=is_log,
    )  # fmt: skip
    best = sorted((point.x, point.y) for point in points if point.name in front)
    path = " ".join(f"{frame.x(at):.1f},{frame.y(value):.1f}" for at, value in best)
    drawn = [*frame.drawn, f'<polyline points="{path}" fill="none" stroke="{GRAY}" stroke-width="1.5"/>']
    taken: list[tuple[float, float, float, float]] = [
        (frame.x(p.x) - 5, frame.y(p.y) - 5, frame.x(p.x) + 5, frame.y(p.y) + 5) for p in points
    ]
    for index, point in enumerate(sorted(points, key=lambda p: (p.name not in front, p.x))):
        px, py, color = frame.x(point.x), frame.y(point.y), COLORS[index % len(COLORS)]
        if point.interval is not None:
            low, high = (frame.y(end) for end in point.interval)
            drawn.append(f'<path d="M{px:.1f} {low:.1f}V{high:.1f}" stroke="{color}" stroke-width="1.5"/>')
        title = _title(f"{point.name}: {x} {point.x:.3f}, {y} {point.y:.5f}")
        drawn.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="{color}">{title}</circle>')
        place = _free(px, py, _width([_short(point.name)]), taken)
        # A name without room is in its point's tooltip, and in the table.
        if place is not None:
            taken.append(place)
            at, anchor = (place[0], "start") if place[0] > px else (place[2], "end")
            if place[0] < px < place[2]:
                at, anchor = px, "middle"
            drawn.append(_text(at, (place[1] + place[3]) / 2, _short(point.name), anchor, point.name))
    return _svg(WIDTH, frame.height, drawn)


def grid(cells: dict[tuple[int, str], float], said: str) -> str:
    """Draw a value for each layer and module, darker where it is larger; `said` names the values."""
    layers, modules = sorted({layer for layer, _ in cells}), list(dict.fromkeys(module for _, module in cells))
    left = _width([_short(module) for module in modules]) + GAP
    wide, low, high = (WIDTH - left) / len(layers), min(cells.values()), max(cells.values())
    drawn = []
    for row, module in enumerate(modules):
        drawn.append(_text(left - GAP / 2, TOP + row * 22 + 11, _short(module), "end", module))
        for column, layer in enumerate(layers):
            if (value := cells.get((layer, module))) is None:
                continue
            share = (value - low) / (high - low or 1.0)
            at, title = left + column * wide, _title(f"layer {layer}, {module}: {value:.2f} {said}")
            drawn.append(
                f'<rect x="{at:.1f}" y="{TOP + row * 22}" width="{wide:.1f}" height="22" fill="{BLUE}"'
                f' fill-opacity="{0.12 + 0.88 * share:.2f}">{title}</rect>'
            )
            if len(layers) <= MANY_LAYERS and wide > 22:
                color = ' fill="#fff"' if share > 0.5 else ""
                drawn.append(_text(at + wide / 2, TOP + row * 22 + 11, f"{value:.1f}", "middle", size=10, style=color))
    bottom = TOP + len(modules) * 22
    step = -(-len(layers) // MANY_LAYERS)
    for column, layer in list(enumerate(layers))[::step]:
        drawn.append(_text(left + (column + 0.5) * wide, bottom + 12, str(layer), "middle"))
    drawn.append(_text(left + (WIDTH - left) / 2, bottom + 30, "layer", "middle"))
    drawn.append(_text(left, 12, f"{said}: {low:.2f} (faint) to {high:.2f} (strong)"))
    return _svg(WIDTH, bottom + BOTTOM, drawn)


class _Frame:
    """The axes of a chart: where values lie, and the drawn lines, ticks and titles."""

    def __init__(
        self, xs: tuple[float, float], ys: tuple[float, float], x: str, y: str, *, height: int, whole: bool,
        is_log: bool,
    ) -> None:  # fmt: skip
        self.height = height
        self._xs, self._ys, self._log = xs, ys, is_log
        y_ticks = [tick for tick in (_log_ticks(*ys) if is_log else _ticks(*ys)) if ys[0] <= tick <= ys[1]]
        x_ticks = [t for t in _ticks(*xs) if xs[0] <= t <= xs[1] and (not whole or t == int(t))]
        self._left = _width([f"{tick:.4g}" for tick in y_ticks]) + GAP
        self.drawn = [_text(self._left, 12, y)]
        for tick in y_ticks:
            at = self.y(tick)
            self.drawn.append(
                f'<path d="M{self._left:.1f} {at:.1f}H{WIDTH - GAP}" stroke="currentColor" stroke-opacity="0.15"/>'
            )
            self.drawn.append(_text(self._left - 5, at, f"{tick:.4g}", "end"))
        bottom = height - BOTTOM
        self.drawn.append(f'<path d="M{self._left:.1f} {bottom}H{WIDTH - GAP}" stroke="currentColor"/>')
        for tick in x_ticks:
            self.drawn.append(f'<path d="M{self.x(tick):.1f} {bottom}v4" stroke="currentColor"/>')
            self.drawn.append(_text(self.x(tick), bottom + 13, f"{tick:.4g}", "middle"))
        self.drawn.append(_text((self._left + WIDTH) / 2, height - 8, x, "middle"))

    def x(self, value: float) -> float:
        low, high = self._xs
        return self._left + GAP + (value - low) / (high - low or 1.0) * (WIDTH - self._left - 3 * GAP)

    def y(self, value: float) -> float:
        low, high, place = *self._ys, value
        if self._log:
            low, high, place = math.log(low), math.log(high), math.log(value)
        bottom = self.height - BOTTOM
        return bottom - (place - low) / (high - low or 1.0) * (bottom - TOP)


def _wider(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    by = (high - low or high or 1.0) * 0.08
    return low - by, high + by


def _ticks(low: float, high: float) -> list[float]:
    """Return some five round numbers between two."""
    rough = (high - low or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(each * step, 12) for each in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = [each * 10.0**power for power in powers for each in (1, 2, 5)]
    return few if len(powers) <= 4 else [10.0**power for power in powers]


def _free(
    px: float, py: float, wide: float, taken: Sequence[tuple[float, float, float, float]]
) -> tuple[float, float, float, float] | None:
    """Return a free box (left, top, right, bottom) for a name beside a point, if there is one."""
    for left, top in ((px + 8, py - 8), (px - wide - 8, py - 8), (px - wide / 2, py - 24), (px - wide / 2, py + 8),
                      (px + 8, py - 22), (px + 8, py + 6)):  # fmt: skip
        box = (left, top, left + wide, top + 15)
        is_inside = left >= 0 and box[2] <= WIDTH and top >= 0
        if is_inside and all(
            box[2] < other[0] or box[0] > other[2] or box[3] < other[1] or box[1] > other[3] for other in taken
        ):
            return box
    return None


def _legend(entries: Sequence[tuple[str, str]], at: float) -> str:
    drawn = ""
    for word, color in entries:
        drawn += f'<rect x="{at:.1f}" y="6" width="12" height="12" fill="{color}"/>' + _text(at + 17, 12, word)
        at += 17 + _width([word]) + 2 * GAP
    return drawn


def _short(label: str) -> str:
    label = shown(label)
    half = LONGEST // 2
    return label if len(label) <= LONGEST else f"{label[:half]}…{label[1 - half :]}"


def _width(texts: Sequence[str]) -> float:
    return max((len(text) for text in texts), default=0) * LETTER


def _title(text: str) -> str:
    return f"<title>{escape(shown(text)[:600])}</title>"


def _text(
    x: float, y: float, text: str, anchor: str = "start", whole: str = "", size: int = FONT, style: str = ""
) -> str:  # fmt: skip
    """Write a text whose middle is at y; `whole` is the tooltip of a text that is shortened."""
    title = _title(whole) if whole and whole != text else ""
    style = style or ' fill="currentColor"'
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" dominant-baseline="central"{style}>'
        f"{escape(shown(text))}{title}</text>"
    )


def _svg(width: int, height: float, drawn: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}"'
        f' height="{height:.0f}" font-family="system-ui, sans-serif" role="img">{"".join(drawn)}</svg>'
    )
