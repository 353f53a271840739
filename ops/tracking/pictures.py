"""Two pictures: who has which classes, and how the clients of a round spent their time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

INK, PALE, PAPER = (40, 40, 40), (205, 205, 205), (255, 255, 255)
LOW, HIGH = np.array([247, 251, 255]), np.array([8, 48, 107])
PHASES = {"download": (141, 160, 203), "compute": (102, 166, 30), "upload": (230, 171, 2)}
# How an attempt ended: the mark at its end.
ENDS = {"merged": (27, 120, 55), "late": (217, 95, 2), "lost": (200, 20, 30), "stale": (117, 112, 179)}
ENDS |= {"abandoned": (120, 120, 120)}
TEXT = 12  # pixels
LEFT, TOP, RIGHT, BOTTOM = 56, 48, 24, 44
CLIENTS = 60  # rows of a timeline, so that they can be read
ROW, BAR, WIDTH = 14, 8, 760
CELLS = 760  # pixels of a heatmap's clients, about


@dataclass(frozen=True)
class Axis:
    """Where values lie on a line of ``pixels`` from ``begin``."""

    low: float
    high: float
    begin: int
    pixels: int

    def at(self, value: float) -> int:
        return self.begin + round((value - self.low) / (self.high - self.low) * self.pixels)

    def ticks(self, about: int = 8) -> list[float]:
        """Round values, about so many."""
        rough = (self.high - self.low) / about
        power = 10.0 ** np.floor(np.log10(rough))
        step = float(power * next(m for m in (1, 2, 5, 10) if m * power >= rough))
        first = np.ceil(self.low / step - 1e-9)
        return [float(n * step) for n in np.arange(first, np.floor(self.high / step + 1e-9) + 1)]


def heatmap(samples: np.ndarray) -> Image.Image:
    """``samples``: training samples, (clients, classes). Clients from left to right, classes from top to bottom."""
    clients, classes = samples.shape
    wide, high = max(3, min(24, CELLS // clients)), max(4, min(18, 360 // classes))
    picture, draw = _sheet(
        LEFT + clients * wide + RIGHT + 70, TOP + classes * high + BOTTOM, "training samples of each class"
    )
    most = max(int(samples.max()), 1)
    cells = _shade(samples.T / most).repeat(high, axis=0).repeat(wide, axis=1)
    picture.paste(Image.fromarray(cells), (LEFT, TOP))
    bottom, right = TOP + classes * high, LEFT + clients * wide
    for number in range(0, classes, -(-TEXT // high)):
        _write(draw, LEFT - 6, TOP + number * high + high // 2, str(number), "rm")
    for number in range(0, clients, max(1, -(-32 // wide // 5) * 5)):
        _write(draw, LEFT + number * wide + wide // 2, bottom + 4, str(number), "mt")
    _write(draw, 6, TOP - 10, "class", "lm")
    _write(draw, LEFT, bottom + 22, f"client (of the first {clients})", "lt")
    scale = np.linspace(1, 0, classes * high)[:, None].repeat(14, axis=1)
    picture.paste(Image.fromarray(_shade(scale)), (right + 16, TOP))
    _write(draw, right + 34, TOP, str(most), "lt")
    _write(draw, right + 34, bottom, "0", "lb")
    return picture


def timeline(table: pa.Table) -> Image.Image | None:
    """A round's rows of the timeline, a bar for each of the first clients; None if nobody's attempt ended."""
    if not len(table):
        return None
    rows = table.slice(0, CLIENTS).to_pylist()
    begin, end = (table[f"round_{edge}_s"][0].as_py() for edge in ("begin", "end"))
    low = min(row["start_s"] for row in rows)
    axis = Axis(low, max(end, low + 1e-9), LEFT + 60, WIDTH)
    bottom = TOP + len(rows) * ROW
    title = f"round {rows[0]['round']}: {len(table)} clients"
    title += f", the first {CLIENTS} of them" if len(table) > CLIENTS else ""
    picture, draw = _sheet(axis.begin + WIDTH + RIGHT, bottom + BOTTOM, title)
    for tick in axis.ticks():
        draw.line([(axis.at(tick), TOP), (axis.at(tick), bottom)], PALE)
        _write(draw, axis.at(tick), bottom + 4, f"{tick:,.10g}", "mt")
    _write(draw, axis.begin, bottom + 22, "simulated seconds since the run began", "lt")
    for edge in (begin, end):
        if edge >= low:
            draw.line([(axis.at(edge), TOP), (axis.at(edge), bottom)], INK)
    for at, row in enumerate(rows):
        middle = TOP + at * ROW + ROW // 2
        _write(draw, axis.begin - 8, middle, f"{row['client']} (level {row['level']})", "rm")
        _bar(draw, axis, middle, row)
    _legend(draw, axis.begin, TOP - 14, {row["fate"] for row in rows})
    return picture


def _bar(draw: ImageDraw.ImageDraw, axis: Axis, middle: int, row: dict[str, Any]) -> None:
    """What the client did, until it stopped, and the mark of how that ended."""
    stop = row["stop_s"]
    # A moment that never comes is None.
    moments = [row["start_s"], *(row[f"{name}_s"] for name in ("downloaded", "computed", "finish"))]
    edges = [axis.at(stop if moment is None else min(moment, stop)) for moment in moments]
    top, bottom = middle - BAR // 2, middle + BAR // 2
    for colour, left, right in zip(PHASES.values(), edges, edges[1:], strict=False):
        if right > left:
            draw.rectangle([left, top, right - 1, bottom], colour)
    draw.rectangle([axis.at(stop) - 1, top - 2, axis.at(stop) + 1, bottom + 2], ENDS.get(row["fate"], INK))


def _legend(draw: ImageDraw.ImageDraw, left: int, middle: int, fates: set[str]) -> None:
    shown = PHASES | {fate: colour for fate, colour in ENDS.items() if fate in fates}
    for name, colour in shown.items():
        wide = 10 if name in PHASES else 3
        draw.rectangle([left, middle - 5, left + wide, middle + 5], colour)
        _write(draw, left + wide + 5, middle, name, "lm")
        left += wide + 26 + round(draw.textlength(name, _font()))


def _sheet(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (max(width, 420), height), PAPER)
    draw = ImageDraw.Draw(picture)
    _write(draw, 6, 6, title, "lt")
    return picture, draw


def _shade(shares: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1."""
    colours: np.ndarray = (LOW + shares[..., None] * (HIGH - LOW)).round().astype(np.uint8)
    return colours


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, anchor: str) -> None:
    """``anchor``: l, m, r across and t, m, b down, as Pillow has it."""
    draw.text((x, y), text, INK, _font(), anchor)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)
