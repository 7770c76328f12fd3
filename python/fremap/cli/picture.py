"""A mapping drawn in the terminal: window pages from left to right, file pages upwards."""

import numpy as np
import numpy.typing as npt

CELLS = 30
LINES = 10
DOTS_DRAWN = 240  # more make noise of a shuffled mapping
ASCII_DOTS_DRAWN = 80
# The bit of U+2800 for each dot of a cell: rows from the top, left and right.
BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def dots_drawn(page_count: int, *, unicode: bool) -> int:
    """Return how many of `page_count` window pages `draw` draws."""
    return min(page_count, DOTS_DRAWN if unicode else ASCII_DOTS_DRAWN)


def draw(mapping: npt.NDArray[np.int64], file_page_count: int, *, unicode: bool) -> list[str]:
    """Draw a mapping as `LINES` lines of `CELLS` characters.

    Parameters
    ----------
    mapping : ndarray of int64
        The file page that each window page shows; negative for none.
    file_page_count : int
        Pages of the file: the height of the picture.
    unicode : bool
        Braille, eight dots a character; else one ``*`` a character.

    Returns
    -------
    list of str
        The lines, the last file pages first.

    Examples
    --------
    >>> draw(np.arange(30), 30, unicode=False)[-1].rstrip()
    '***'
    """
    across, down = (CELLS * 2, LINES * 4) if unicode else (CELLS, LINES)
    shown = np.linspace(0, len(mapping) - 1, dots_drawn(len(mapping), unicode=unicode))
    shown = shown.astype(np.int64)
    shown = shown[mapping[shown] >= 0]
    columns = shown * across // len(mapping)
    rows = down - 1 - mapping[shown] * down // file_page_count
    dots = np.zeros((down, across), dtype=bool)
    dots[rows, columns] = True
    if not unicode:
        return ["".join("*" if dot else " " for dot in row) for row in dots]
    cells = dots.reshape(LINES, 4, CELLS, 2).transpose(0, 2, 1, 3)
    codes = (cells * BRAILLE).sum(axis=(2, 3)) + 0x2800
    return ["".join(map(chr, row)) for row in codes]


def side_by_side(left: list[str], right: list[str], titles: tuple[str, str]) -> list[str]:
    """Return two pictures in frames of plain characters, beside each other.

    Parameters
    ----------
    left, right : list of str
        What `draw` returned.
    titles : tuple of str
        What stands above each.

    Returns
    -------
    list of str
        The lines.
    """
    edge = "+" + "-" * CELLS + "+"
    lines = [f"{titles[0]:<{CELLS + 2}}   {titles[1]}", f"{edge}   {edge}"]
    lines += [f"|{one}|   |{other}|" for one, other in zip(left, right, strict=True)]
    return [*lines, f"{edge}   {edge}"]
