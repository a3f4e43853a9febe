"""Figures that people can read."""

import pytest

from dpt.errors import UserError
from dpt.scaling.figures import metric_label
from dpt.scaling.plots import curves, law_figure, new_axes, save, short_number, style_of


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "0.05"), (200, "200"), (2000, "2000"), (2e4, "20k"), (1.5e6, "1.5M"), (1e12, "1T"), (3e15, "3P"), (0, "0")],
)
def test_ticks_are_numbers_that_people_read(value, text):
    assert short_number(value) == text


def test_no_two_series_look_alike():
    assert len({tuple(style_of(i).values()) for i in range(32)}) == 32
    assert len({(style_of(i)["color"], style_of(i)["linestyle"]) for i in range(16)}) == 16


def test_legends_stand_beside_the_axes():
    pairs = {f"run {i}": [(float(s), 1.0 / (s + i + 1)) for s in range(1, 50)] for i in range(3)}
    for figure in (curves(pairs, "optimizer step", "training loss", log_y=True), law_figure(pairs, {}, "MACs", "AbsRel")):
        (axes,) = figure.axes
        figure.canvas.draw()
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
        labels = [t.get_text() for t in axes.get_yticklabels() if t.get_text()]
        assert labels
        assert not any("10^" in text for text in labels)


def test_axes_have_names_and_units():
    assert metric_label("eval/depth/abs_rel") == "AbsRel, as a share"
    assert metric_label("eval/flow/set_val/epe") == "EPE, px"
    assert metric_label("1-eval/depth/delta1") == "1 - δ1, as a share"
    assert metric_label("train/loss") == "training loss"


@pytest.mark.parametrize("name", ["mlflow.db", "figure", "figure.svgz.x"])
def test_a_figure_goes_into_files_of_figures_alone(name, tmp_path):
    figure, _ = new_axes("x", "y")
    with pytest.raises(UserError, match=r"can be written as \.svg, \.png, \.pdf"):
        save(figure, tmp_path / name)
    assert not (tmp_path / name).exists()
