"""Groups of bars as a PNG, drawn with what the product needs anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

_COLOURS = ("#1f5fbf", "#c0392b", "#e08e0b", "#7f8c8d", "#8e44ad", "#2e8b57")
_BAR, _GAP, _HEIGHT, _HEAD, _FOOT, _LEFT = 12, 26, 130, 26, 22, 60

Panel = Mapping[str, Sequence[float]]
"""By group, the values of all series."""


def draw(path: Path, series: Sequence[str], panels: Mapping[str, Panel]) -> None:
    """One panel below the other, each with a scale of its own; ``series`` name the bars of every group."""
    groups = max(len(panel) for panel in panels.values())
    width = _LEFT + groups * (_BAR * len(series) + _GAP) + _GAP
    panel_height = _HEAD + _HEIGHT + _FOOT
    image = Image.new("RGB", (max(width, 640), 24 + panel_height * len(panels)), "white")
    pen = ImageDraw.Draw(image)
    for number, name in enumerate(series):
        pen.rectangle((_LEFT + number * 110, 7, _LEFT + number * 110 + 10, 17), fill=_COLOURS[number % len(_COLOURS)])
        pen.text((_LEFT + number * 110 + 14, 6), name, fill="black")
    for number, (title, panel) in enumerate(panels.items()):
        _panel(pen, 24 + number * panel_height, title, panel)
    image.save(path)


def _panel(pen: ImageDraw.ImageDraw, top: int, title: str, panel: Panel) -> None:
    most = max(value for values in panel.values() for value in values) or 1.0
    floor = top + _HEAD + _HEIGHT
    pen.text((_LEFT, top + 8), title, fill="black")
    pen.text((4, top + _HEAD - 4), f"{most:.4g}", fill="black")
    pen.text((4, floor - 10), "0", fill="black")
    pen.line((_LEFT - 4, floor, _LEFT + len(panel) * (_BAR * 7 + _GAP), floor), fill="black")
    left = _LEFT
    for group, values in panel.items():
        for number, value in enumerate(values):
            height = round(_HEIGHT * value / most)
            box = (left + number * _BAR, floor - height, left + (number + 1) * _BAR - 2, floor)
            pen.rectangle(box, fill=_COLOURS[number % len(_COLOURS)])
        pen.text((left, floor + 4), group, fill="black")
        left += _BAR * len(values) + _GAP
