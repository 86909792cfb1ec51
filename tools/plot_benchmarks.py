"""Plots of the tables of docs/benchmarks.md, as SVG: whatever the tables say when the site is built."""

import argparse
import io
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt  # noqa: E402

PAGE = 'docs/benchmarks.md'
MARK = re.compile(r'^<!-- plot: (\w+) -->\n', re.MULTILINE)
COLOURS = ('#0072b2', '#e69f00', '#56b4e9', '#d55e00')  # told apart by colour-blind people too


class Series(NamedTuple):
    """One colour of bars: the number at place ``index`` in the cells of a column, titled ``column`` or beginning so."""

    name: str
    column: str
    index: int = 0


class Plot(NamedTuple):
    """The plot of the table right below its mark, `<!-- plot: NAME -->`.

    labels: the columns that tell the rows apart.
    unit: of the axis; ``log``: dots on a logarithmic axis in place of bars.
    """

    title: str
    labels: tuple[str, ...]
    unit: str
    series: tuple[Series, ...]
    log: bool = False


def _beside(title: str, rival: str, labels: tuple[str, ...], ours: str) -> Plot:
    """A model beside another one."""
    return Plot(title, labels, 'ms for the batch', (Series(ours, ours), Series(rival, rival)))


MODES = ('input, batch', 'pass', 'mode')
PLOTS = {
    'cpu': Plot(
        'Operators on two CPU cores, in units of comparable work',
        ('operator', 'shape'),
        'units',
        (Series('forward', 'units'), Series('forward + backward', 'units#2')),
    ),
    'bi_wkv': Plot(
        'Bi-WKV, float32',
        ('B, T, C',),
        'ms',
        (
            Series('forward', 'float32 forward'),
            Series('forward, published', 'published'),
            Series('backward', 'backward'),
            Series('backward, published', 'published', 1),
        ),
        log=True,
    ),
    'wkv6': Plot(
        'WKV6 in both directions, float32',
        ('B, T, H',),
        'ms',
        (
            Series('forward', 'float32 forward'),
            Series('forward, best rival', 'best rival'),
            Series('backward', 'backward'),
            Series('backward, best rival', 'best rival', 1),
        ),
        log=True,
    ),
    'tiny': _beside('VRWKV-T and DeiT-T', 'DeiT-T', MODES, 'VRWKV-T'),
    'base': _beside('VRWKV-B and DeiT-B', 'DeiT-B', MODES, 'VRWKV-B'),
    'six': _beside('VRWKV6-T and VRWKV-T', 'VRWKV-T', MODES, 'VRWKV6-T'),
}


def rows_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table's lines, its title first and without the line of dashes."""
    lines = [[cell.strip() for cell in line.strip().strip('|').split('|')] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def tables(text: str) -> dict[str, list[list[str]]]:
    """The table below each mark. Raises ValueError for an unknown mark, one without a table, and a plot without one."""
    found = {}
    for mark in MARK.finditer(text):
        name, rest = mark[1], text[mark.end() :].lstrip('\n')
        if name not in PLOTS:
            raise ValueError(f'{PAGE}: no plot is called {name}; known: {", ".join(PLOTS)}')
        table = re.match(r'(?:\|.*\n?)+', rest)
        if not table:
            raise ValueError(f'{PAGE}: expected a table below the mark of {name}, found {rest[:40]!r}')
        found[name] = rows_of(table[0])
    if missing := PLOTS.keys() - found.keys():
        raise ValueError(f'{PAGE}: no mark <!-- plot: NAME --> for {", ".join(sorted(missing))}')
    return found


def column(name: str, titles: list[str], wanted: str) -> int:
    """The number of the column titled ``wanted``, or beginning so; `x#2` is the second of them. Raises ValueError."""
    start, _, number = wanted.partition('#')
    exact = [i for i, title in enumerate(titles) if title == start]
    places = exact or [i for i, title in enumerate(titles) if title.startswith(start)]
    if len(places) < int(number or 1):
        raise ValueError(f'{PAGE}: plot {name} expects a column {wanted!r}, found {titles}')
    return places[int(number or 1) - 1]


def numbers(cell: str) -> list[float]:
    """The numbers of a cell but those in parentheses: '0.02 / 0.04 (0.8 / 0.9)' -> [0.02, 0.04], '-' -> [].

    Of a range, 'FASTEST to SLOWEST', the slowest.
    """
    cell = re.sub(r'\([^)]*\)', '', cell).rpartition(' to ')[2]
    return [float(number) for number in re.findall(r'\d+(?:\.\d+)?', cell)]


def values(name: str, rows: list[list[str]]) -> tuple[list[str], dict[str, list[float]]]:
    """The rows' labels, and the numbers of each series; NaN where a cell has none. Raises ValueError."""
    plot, (titles, *body) = PLOTS[name], rows
    labels = ['  '.join(row[column(name, titles, title)] for title in plot.labels) for row in body]
    found = {}
    for series in plot.series:
        cells = [numbers(row[column(name, titles, series.column)]) for row in body]
        found[series.name] = [cell[series.index] if len(cell) > series.index else float('nan') for cell in cells]
        if all(value != value for value in found[series.name]):
            raise ValueError(f'{PAGE}: plot {name} finds no number for {series.name!r} in {series.column!r}')
    return labels, found


def draw(name: str, rows: list[list[str]]) -> bytes:
    """The plot of a table as SVG, the rows from the top down."""
    plot = PLOTS[name]
    labels, found = values(name, rows)
    thickness = 0.8 / len(found)
    with plt.rc_context({'svg.hashsalt': name, 'svg.fonttype': 'none', 'font.size': 9}):
        size = (8, 1.2 + len(labels) * (0.25 if plot.log else 0.12 + 0.14 * len(found)))
        figure, axes = plt.subplots(figsize=size, layout='constrained')
        for number, (series, points) in enumerate(found.items()):
            if plot.log:  # bars would start nowhere
                axes.semilogx(points, range(len(labels)), 'o', label=series, color=COLOURS[number])
            else:
                places = [row + (number - (len(found) - 1) / 2) * thickness for row in range(len(labels))]
                axes.barh(places, points, thickness, label=series, color=COLOURS[number])
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set(xlabel=plot.unit, title=plot.title)
        axes.grid(axis='both' if plot.log else 'x', alpha=0.3)
        figure.legend(loc='outside lower center', ncols=len(found))
        picture = io.BytesIO()
        figure.savefig(picture, format='svg', metadata={'Date': None})
        plt.close(figure)
    return picture.getvalue()


def draw_all(text: str) -> dict[str, bytes]:
    """The SVG of each plot, from the text of docs/benchmarks.md. Raises ValueError, naming the plot."""
    return {name: draw(name, rows) for name, rows in tables(text).items()}


def show(text: str, folder: str) -> str:
    """``text`` with a picture from ``folder`` in place of each mark."""
    return MARK.sub(lambda mark: f'![{PLOTS[mark[1]].title}]({folder}/{mark[1]}.svg)\n\n', text)


def main() -> None:
    """Write the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/plots'), help='folder (default: %(default)s)')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).resolve().parents[1]
    for name, picture in draw_all((root / PAGE).read_text()).items():
        (args.out / f'{name}.svg').write_bytes(picture)
        print(args.out / f'{name}.svg')


if __name__ == '__main__':
    main()
