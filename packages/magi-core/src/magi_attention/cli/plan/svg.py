# SPDX-License-Identifier: Apache-2.0
"""A chart as inline SVG. Colors come from the page's style sheet, so that it follows the reader's light or dark."""

import math
from collections.abc import Sequence
from html import escape


class Chart:
    """A drawing with a horizontal axis of numbers and rows or numbers down the side.

    Args:
        width: of the drawing, in pixels; the page scales it.
        height: of the drawing.
        x_range: the numbers at the left and right ends.
        y_range: the numbers at the top and bottom ends.
        left: room for labels at the side.
    """

    TOP, RIGHT, BOTTOM = 8, 22, 34

    def __init__(
        self,
        width: int,
        height: int,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        left: int = 86,
    ) -> None:
        self.width, self.height, self.left = width, height, left
        self.x_range, self.y_range = x_range, y_range
        self.grid: list[str] = []
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        """Where a number lies on the horizontal axis."""
        first, last = self.x_range
        return self.left + (value - first) / (last - first) * (self.width - self.left - self.RIGHT)

    def y(self, value: float) -> float:
        """Where a number lies on the vertical axis."""
        first, last = self.y_range
        return self.TOP + (value - first) / (last - first) * (self.height - self.TOP - self.BOTTOM)

    def bar(
        self, start: float, stop: float, top: float, bottom: float, style: str, tip: str = "", fill: str = ""
    ) -> None:
        """Draw a rectangle; ``tip`` shows under the mouse, ``fill`` replaces the style's color."""
        width = max(self.x(stop) - self.x(start), 0.5 if stop > start else 0)
        attributes = f' fill="{fill}"' if fill else ""
        if tip:
            attributes += f' data-tip="{escape(tip)}"'
        self.parts.append(
            f'<rect class="{style}" x="{self.x(start):.1f}" y="{self.y(top):.1f}" width="{width:.1f}" '
            f'height="{self.y(bottom) - self.y(top):.1f}"{attributes}/>'
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, style: str) -> None:
        """Draw a straight line."""
        self.parts.append(self._line(x0, y0, x1, y1, style))

    def _line(self, x0: float, y0: float, x1: float, y1: float, style: str) -> str:
        return (
            f'<line class="{style}" x1="{self.x(x0):.1f}" y1="{self.y(y0):.1f}" '
            f'x2="{self.x(x1):.1f}" y2="{self.y(y1):.1f}"/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start", dx: float = 0, style: str = "") -> None:
        """Write words beside a point."""
        self.parts.append(
            f'<text class="{style}" x="{self.x(x) + dx:.1f}" y="{self.y(y):.1f}" text-anchor="{anchor}" '
            f'dominant-baseline="middle">{escape(words)}</text>'
        )

    def image(self, source: str, name: str) -> None:
        """Fill the plane of the axes with a picture; ``name`` tells the page's script what lies under the mouse."""
        left, right = self.x(self.x_range[0]), self.x(self.x_range[1])
        top, bottom = self.y(self.y_range[0]), self.y(self.y_range[1])
        box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
        ranges = ",".join(repr(number) for number in (*self.x_range, *self.y_range))
        self.parts.append(f'<rect class="plane" {box}/>')
        self.parts.append(
            f'<image {box} preserveAspectRatio="none" href="{source}" data-plane="{name}" data-ranges="{ranges}"/>'
        )

    def x_axis(self, label: str, names: Sequence[tuple[float, str]] | None = None, factor: float = 1) -> None:
        """Draw ticks at round numbers, or at ``names``, and below them what they count, in units of ``factor``."""
        bottom = self.y_range[1]
        for value, name in names or [(tick * factor, f"{tick:g}") for tick in ticks(self.x_range[1] / factor)]:
            self.grid.append(self._line(value, self.y_range[0], value, bottom, "grid"))
            place = f'x="{self.x(value):.1f}" y="{self.y(bottom) + 13:.1f}"'
            self.parts.append(f'<text {place} text-anchor="middle">{escape(name)}</text>')
        middle = (self.x(self.x_range[0]) + self.x(self.x_range[1])) / 2
        self.parts.append(
            f'<text class="label" x="{middle:.1f}" y="{self.height - 5}" text-anchor="middle">{escape(label)}</text>'
        )

    def y_names(self, names: Sequence[tuple[float, str]]) -> None:
        """Write names at the side."""
        for value, name in names:
            self.text(self.x_range[0], value, name, "end", -8)

    def render(self, description: str) -> str:
        """The drawing as an ``<svg>`` element."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(description)}">'
            f"{''.join(self.grid + self.parts)}</svg>"
        )


def ticks(largest: float, about: int = 5) -> list[float]:
    """Round numbers from 0 to ``largest``, about as many as asked for."""
    if largest <= 0:
        return [0.0]
    raw = largest / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [round(index * step, 12) for index in range(int(largest / step) + 1)]
