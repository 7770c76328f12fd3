"""Small pictures of windows, slots and rows, for notebooks: HTML with an SVG in it.

Bounded in size and cost, whatever is drawn: a window or slots of more than `_MOST_CELLS` are
drawn by cells of several, and of a cell `_MOST_SAMPLES` at most are looked at. Colours and
text are readable on light and dark pages.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from fremap.arguments import counted
from fremap.errors import FremapError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

__all__ = ["PAGE_STATES", "SLOT_STATES", "State", "files_picture", "grid_picture"]

Numbers: TypeAlias = "npt.NDArray[np.int64]"
Looked: TypeAlias = tuple["npt.NDArray[np.integer[Any]]", Mapping[str, int], str]

_COLUMNS = 64
_MOST_CELLS = 512
_MOST_SAMPLES = 16
_CELL = 10  # pixels of a cell and the gap behind it
_LEAST_SHARE = 0.2  # of a cell, however few of its pages are in a state
_MOST_FILES = 16


class State(NamedTuple):
    """What a page or slot may be, and how that is drawn."""

    name: str
    color: str
    opacity: float = 1.0


# Of a page to which several apply the last one counts.
PAGE_STATES = (
    State("shows nothing", "#888888", 0.2),
    State("absent", "#888888", 0.5),
    State("present", "#3987e5"),
    State("dirty", "#e8833a"),
    State("pinned", "#8e5fd0"),
    State("placed", "#2aa876"),
    State("denied", "#d64545"),
)
SLOT_STATES = (
    State("empty", "#888888", 0.5),
    State("filled", "#3987e5"),
    State("pinned", "#8e5fd0"),
)
_FILES = (State("a file", "#3987e5"), State("a file", "#2aa876"))
_MORE_FILES = State("more files", "#888888", 0.5)


def grid_picture(
    title: str, count: int, noun: str, states: Sequence[State], look: Callable[[Numbers], Looked]
) -> str:
    """Draw pages or slots as a grid of cells.

    Parameters
    ----------
    title : str
        What it is.
    count : int
        How many there are; 0 of something that is closed.
    noun : str
        What one is called.
    states : sequence of State
        What each may be.
    look : callable
        Given some of them by number, returns the place of the state of each in `states`, how
        many there are of some states by name, and a line of text.

    Returns
    -------
    str
        HTML.
    """
    if count == 0:
        return _framed(title, [])
    cells = _Cells(count, noun, states)
    try:
        state, counts, text = look(cells.samples)
    except FremapError as error:  # closed meanwhile, or another process's
        return _framed(title, [_line(str(error))])
    below = f"{cells.scale}; {text}" if text else cells.scale
    return _framed(title, [cells.drawn(state), _legend(states, counts), _line(below)])


def files_picture(title: str, names: Iterable[str], counts: Numbers, text: str) -> str:
    """Draw files as parts of a bar, each as long as it has rows.

    Parameters
    ----------
    title : str
        What they are.
    names : iterable of str
        The names of the files, in order; no more are asked for than are drawn.
    counts : ndarray of int64
        Rows of each.
    text : str
        A line below.

    Returns
    -------
    str
        HTML.
    """
    ends = np.cumsum(counts)
    total = max(1, int(counts.sum()))
    width = _COLUMNS * _CELL
    parts, lines = [], []
    for number, (name, end) in enumerate(zip(names, ends[:_MOST_FILES].tolist(), strict=False)):
        count = int(counts[number])
        first = end - count
        line = f"{name}: {counted(count, 'row')}" + (f", {first} to {end - 1}" if count else "")
        place = (first / total * width, 0, count / total * width, 2 * _CELL)
        parts.append(_rectangle(place, _FILES[number % 2], line))
        lines.append(_line(line))
    if len(counts) > _MOST_FILES:
        first = int(ends[_MOST_FILES - 1])
        line = f"{len(counts) - _MOST_FILES} more files: {counted(int(ends[-1]) - first, 'row')}"
        left = first / total * width
        parts.append(_rectangle((left, 0, width - left, 2 * _CELL), _MORE_FILES, line))
        lines.append(_line(line))
    return _framed(title, [_svg(width, 2 * _CELL, parts), *lines, *([_line(text)] if text else [])])


class _Cells:
    """Cells for a number of things, and which of the things are looked at for them.

    Parameters
    ----------
    count : int
        Pages or slots.
    noun : str
        What they are called.
    states : sequence of State
        What they may be.
    """

    def __init__(self, count: int, noun: str, states: Sequence[State]) -> None:
        self._count = count
        self._noun = noun
        self._states = states
        self._each = -(-count // _MOST_CELLS)
        self._cells = -(-count // self._each)
        firsts = np.arange(self._cells, dtype=np.int64) * self._each
        sizes = np.minimum(self._each, count - firsts)
        self._sampled = np.minimum(sizes, _MOST_SAMPLES)
        # Spread evenly, the first among them.
        within = np.arange(_MOST_SAMPLES)[None, :]
        places = firsts[:, None] + within * sizes[:, None] // self._sampled[:, None]
        self.samples: Numbers = places[within < self._sampled[:, None]]

    @property
    def scale(self) -> str:
        """What a cell is."""
        if self._each == 1:
            return f"a cell is a {self._noun}"
        text = f"a cell is {self._each} {self._noun}s"
        if self._each > _MOST_SAMPLES:
            text += f", of which {_MOST_SAMPLES} were looked at"
        return text

    def drawn(self, state: npt.NDArray[np.integer[Any]]) -> str:
        """Return the cells as an SVG, given the state of each sample."""
        kinds = len(self._states)
        cell = np.repeat(np.arange(self._cells), self._sampled)
        tally = np.bincount(cell * kinds + state, minlength=self._cells * kinds)
        parts = []
        start = 0
        rows = tally.reshape(self._cells, kinds)
        for number in range(1, self._cells + 1):
            # Neighbours in a line that are alike are one rectangle.
            if (
                number < self._cells
                and number % _COLUMNS
                and (
                    rows[number] * self._sampled[start] == rows[start] * self._sampled[number]
                ).all()
            ):
                continue
            parts += self._bars(start, number, rows[start] / self._sampled[start])
            start = number
        columns = min(self._cells, _COLUMNS)
        return _svg(columns * _CELL, -(-self._cells // _COLUMNS) * _CELL, parts)

    def _bars(self, start: int, stop: int, shares: npt.NDArray[np.float64]) -> list[str]:
        """Return cells that are alike: a bar for each state, as high as its share."""
        first, last = start * self._each, min(stop * self._each, self._count) - 1
        where = f"{self._noun} {first}" if first == last else f"{self._noun}s {first} to {last}"
        found = [(state, share) for state, share in zip(self._states, shares, strict=True) if share]
        mixed = ", ".join(
            state.name if share == 1 else f"{share:.0%} {state.name}" for state, share in found
        )
        left, top = start % _COLUMNS * _CELL, float(start // _COLUMNS * _CELL)
        width = (stop - start) * _CELL - 1
        bars = []
        # What is rare is seen, too.
        weights = [max(share, _LEAST_SHARE) for _, share in found]
        for (state, _), weight in zip(found, weights, strict=True):
            height = weight / sum(weights) * (_CELL - 1)
            bars.append(_rectangle((left, top, width, height), state, f"{where}: {mixed}"))
            top += height
        return bars


def _rectangle(place: tuple[float, float, float, float], state: State, text: str) -> str:
    x, y, width, height = (f"{number:.5g}" for number in place)
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{state.color}" '
        f'fill-opacity="{state.opacity}"><title>{_escaped(text)}</title></rect>'
    )


def _escaped(text: str) -> str:
    """Return text as HTML; names of files may have bytes that are no text."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="max-width:100%">'
        f"{''.join(parts)}</svg>"
    )


def _legend(states: Sequence[State], counts: Mapping[str, int]) -> str:
    """Return what the colours mean, with how many there are where that is counted."""
    parts = []
    for name, color, opacity in states:
        style = f"background:{color};opacity:{opacity};padding:0 .6em;margin-right:.3em"
        box = f'<span style="{style}"></span>'
        count = f" {counts[name]}" if name in counts else ""
        parts.append(
            f'<span style="display:inline-block;margin-right:1em">{box}{name}{count}</span>'
        )
    return f"<div>{''.join(parts)}</div>"


def _line(text: str) -> str:
    return f"<div>{_escaped(text)}</div>"


def _framed(title: str, parts: Sequence[str]) -> str:
    heading = f"<code>{_escaped(title)}</code>"
    return f'<div style="font-size:.9em">{heading}{"".join(parts)}</div>'
