"""Pictures that differ in their contents alone: what surrounds these is drawn once, and used again.

Axes with their ticks and labels take four fifths of the time of drawing a small picture, and a sweep draws the same
ones in every job.
"""

import io
from collections.abc import Iterator
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

DPI = 110


class Framed(Figure):
    """A figure that is filled, drawn and emptied again and again.

    What is in it when `framed` is called is its frame; what is added later are contents. The frame is drawn anew only
    where limits have moved. Contents may be lines, bars, texts and legends, and the figure's title.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(dpi=DPI, **how)
        self._own: dict[Axes, set[Artist]] = {}
        self._containers: dict[Axes, list[Any]] = {}
        self._background: Any = None
        self._drawn_for: object = None

    def framed(self) -> "Framed":
        """Take what is there as the frame."""
        self._own = {axes: set(axes.get_children()) for axes in self.axes}
        self._containers = {axes: list(axes.containers) for axes in self.axes}
        return self

    @property
    def has_frame(self) -> bool:
        """Whether `framed` was called."""
        return bool(self._own)

    def emptied(self) -> "Framed":
        """Remove the contents."""
        for axes in self.axes:
            for artist in list(self._contents(axes)):
                artist.remove()
            axes.containers[:] = self._containers[axes]
            axes.set_prop_cycle(None)
        return self

    def _contents(self, axes: Axes) -> Iterator[Artist]:
        return (artist for artist in axes.get_children() if artist not in self._own[axes])

    def png(self) -> bytes:
        """Draw the frame if it is another than last time, and the contents over it.

        Order and clipping are those of an ordinary drawing but for ticks, which lie outside of the contents.
        """
        canvas = self.canvas if isinstance(self.canvas, FigureCanvasAgg) else FigureCanvasAgg(self)
        limits = [(axes.get_xlim(), axes.get_ylim(), axes.get_xscale(), axes.get_yscale()) for axes in self.axes]
        if self._background is None or limits != self._drawn_for:
            self._draw_frame(canvas)
            self._drawn_for = limits
        canvas.restore_region(self._background)
        renderer = canvas.get_renderer()
        for axes in self.axes:
            over = [*self._contents(axes), *axes.spines.values()]
            for artist in sorted(over, key=lambda one: one.get_zorder()):
                artist.draw(renderer)
        if (title := self._suptitle) is not None:  # type: ignore[attr-defined]
            title.draw(renderer)
        return _encoded(canvas)

    def _draw_frame(self, canvas: FigureCanvasAgg) -> None:
        """Draw the figure without contents, and without what must lie over them."""
        title = self._suptitle  # type: ignore[attr-defined]
        hidden = [artist for axes in self.axes for artist in [*self._contents(axes), *axes.spines.values()]]
        hidden = [artist for artist in [*hidden, *([title] if title else [])] if artist.get_visible()]
        for artist in hidden:
            artist.set_visible(False)
        canvas.draw()
        self._background = canvas.copy_from_bbox(self.bbox)
        for artist in hidden:
            artist.set_visible(True)


def _encoded(canvas: FigureCanvasAgg) -> bytes:
    content = io.BytesIO()
    pixels = canvas.buffer_rgba()  # (height, width, 4)
    image = Image.frombuffer("RGBA", pixels.shape[1::-1], pixels, "raw", "RGBA", 0, 1)  # type: ignore[arg-type]
    image.save(content, format="png", compress_level=1, dpi=(DPI, DPI))
    return content.getvalue()


def png(figure: Figure) -> bytes:
    """Draw a figure as PNG."""
    if isinstance(figure, Framed) and figure.has_frame:
        return figure.png()
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png", pil_kwargs={"compress_level": 1})
    return content.getvalue()


def log_scale(axes: Axes, few_decades: bool) -> None:
    """A logarithmic y axis in plain numbers: matplotlib's powers are formulas, slower than all the rest."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few_decades else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
