"""Plots of the benchmark tables: what is read from them, and what cannot be is named."""

import sys
import xml.etree.ElementTree as ElementTree

import pytest
from scripts import ROOT

from tools import plot_benchmarks as plots

TEXT = (ROOT / plots.PAGE).read_text()


@pytest.mark.parametrize(
    'cell, expected',
    [
        ('0.0270 (2.0x)', [0.027]),
        ('0.0232 / 0.0456 (0.86 / 0.92)', [0.0232, 0.0456]),
        ('4.80 (0.26) to 8.07', [8.07]),
        ('1.85', [1.85]),
        ('-', []),
    ],
)
def test_numbers_of_a_cell(cell, expected):
    assert plots.numbers(cell) == expected


def test_values_are_those_of_the_table():
    rows = plots.rows_of(
        '| B, T, C | float32 forward (x floor) | backward (x floor) | published forward / backward |\n'
        '|---|---|---|---|\n'
        '| 1, 2, 3 | 0.5 (2x) | 1.5 (3x) | 2.5 / 3.5 |\n'
        '| 4, 5, 6 | 0.25 (2x) | 0.75 (3x) | - |\n'
    )
    labels, found = plots.values('bi_wkv', rows)
    assert labels == ['1, 2, 3', '4, 5, 6'] and found['forward'] == [0.5, 0.25] and found['backward'] == [1.5, 0.75]
    assert found['forward, published'][0] == 2.5 and found['backward, published'][0] == 3.5
    assert found['forward, published'][1] != found['forward, published'][1]  # NaN: no such bar


def test_every_plot_is_drawn_from_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['plot_benchmarks.py', '--out', str(tmp_path)])
    plots.main()
    assert len(capsys.readouterr().out.splitlines()) == len(plots.PLOTS)
    for name, rows in plots.tables(TEXT).items():
        picture = (tmp_path / f'{name}.svg').read_bytes()
        words = [text for element in ElementTree.fromstring(picture).iter() for text in [element.text] if text]
        labels, found = plots.values(name, rows)
        assert len(labels) >= 4 and all('  '.join(label.split('  ')) in words for label in labels)
        assert set(found) <= set(words) and plots.PLOTS[name].title in words
        assert picture == plots.draw(name, rows)  # the same bytes each time


def test_pictures_take_the_place_of_the_marks():
    shown = plots.show(TEXT, 'plots')
    assert all(f'![{plot.title}](plots/{name}.svg)' in shown for name, plot in plots.PLOTS.items())
    assert '<!-- plot' not in shown


def test_what_cannot_be_plotted_is_named():
    with pytest.raises(ValueError, match='no plot is called bi_vkw; known: cpu, bi_wkv'):
        plots.tables(TEXT.replace('plot: bi_wkv', 'plot: bi_vkw'))
    with pytest.raises(ValueError, match='no mark <!-- plot: NAME --> for wkv6'):
        plots.tables(TEXT.replace('<!-- plot: wkv6 -->', ''))
    with pytest.raises(ValueError, match='expected a table below the mark of cpu, found '):
        plots.tables(TEXT.replace('<!-- plot: cpu -->', '<!-- plot: cpu -->\n\nwords'))
    rows = plots.tables(TEXT)['tiny']
    with pytest.raises(ValueError, match="plot tiny expects a column 'DeiT-T', found "):
        plots.values('tiny', [[title.replace('DeiT', 'Swin') for title in rows[0]], *rows[1:]])
    with pytest.raises(ValueError, match="plot tiny finds no number for 'DeiT-T'"):
        place = rows[0].index('DeiT-T')
        plots.values('tiny', [rows[0], *([*row[:place], '-', *row[place + 1 :]] for row in rows[1:])])
