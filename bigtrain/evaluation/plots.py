"""Small pictures as SVG text, coloured by the page that they are put into."""

import math
from collections.abc import Iterable
from html import escape

_WIDTH, _HEIGHT = 360, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40  # around the axes
_TICKS = 6  # lines of a grid, at most

Range = tuple[float, float]


class Axes:
    """A plot with two linear axes; the calls put marks on it, `svg` is the picture."""

    def __init__(self, x_range: Range, y_range: Range) -> None:
        self.x_range = _widened(x_range)
        self.y_range = _widened(y_range)
        self.marks: list[str] = []

    def curve(self, points: Iterable[tuple[float, float]], kind: str = "curve") -> None:
        """A line through `points`; `kind`: its class in the page's style."""
        places = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        self.marks.append(f'<polyline class="{kind}" points="{places}"/>')

    def dots(self, points: Iterable[tuple[float, float]], radius: float, kind: str) -> None:
        """A dot at each of `points`."""
        for x, y in points:
            at_x, at_y = f"{self._x(x):.1f}", f"{self._y(y):.1f}"
            place = f'cx="{at_x}" cy="{at_y}"'
            self.marks.append(f'<circle class="{kind}" {place} r="{radius}"/>')

    def bar(self, low: float, high: float, value: float, note: str, kind: str = "bar") -> None:
        """A bar over `low` … `high` of the x axis; `note` appears under the mouse."""
        left = self._x(low)
        top = self._y(value)
        width = self._x(high) - left - 1
        height = self._y(self.y_range[0]) - top
        place = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.marks.append(f'<rect class="{kind}" {place}><title>{escape(note)}</title></rect>')

    def svg(self, x_label: str, y_label: str) -> str:
        """The picture, with a grid and its numbers."""
        parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
        parts += self._grid()
        middle_x = (_LEFT + _WIDTH - _RIGHT) / 2
        middle_y = (_TOP + _HEIGHT - _BOTTOM) / 2
        label = f'x="{middle_x}" y="{_HEIGHT - 6}" text-anchor="middle"'
        parts.append(f"<text {label}>{escape(x_label)}</text>")
        label = f'transform="translate(12 {middle_y}) rotate(-90)" text-anchor="middle"'
        parts.append(f"<text {label}>{escape(y_label)}</text>")
        return "".join([*parts, *self.marks, "</svg>"])

    def _grid(self) -> list[str]:
        lines = []
        for y in _ticks(self.y_range):
            at = f"{self._y(y):.1f}"
            ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"'
            lines.append(f'<line class="grid" {ends}/>')
            place = f'x="{_LEFT - 6}" y="{self._y(y) + 4:.1f}" text-anchor="end"'
            lines.append(f"<text {place}>{y:.4g}</text>")
        for x in _ticks(self.x_range):
            place = f'x="{self._x(x):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle"'
            lines.append(f"<text {place}>{x:.4g}</text>")
        return lines

    def _x(self, value: float) -> float:
        low, high = self.x_range
        share = (value - low) / (high - low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        low, high = self.y_range
        share = (value - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _widened(ends: Range) -> Range:
    """`ends`, apart from each other."""
    low, high = ends
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(ends: Range) -> list[float]:
    """Round numbers between `ends`."""
    low, high = ends
    unit = 10.0 ** math.floor(math.log10((high - low) / _TICKS))
    for factor in (1, 2, 2.5, 5, 10):
        step = unit * factor
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        if last - first < _TICKS:
            break
    return [number * step for number in range(first, last + 1)]
