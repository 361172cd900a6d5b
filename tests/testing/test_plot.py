import re
import sys
from dataclasses import replace
from datetime import date
from xml.etree import ElementTree

import matplotlib
import nnfs
import numpy as np
import pytest
import torch

from torchnnfs import classifier, compare, spiral
from torchnnfs.testing import plot
from torchnnfs.testing.candidates import MissingExtraError

RED = matplotlib.colors.to_rgba("#D55E00")
PLAIN = {"candidates": ["eager"], "controls": False}


def texts(artist):
    return [text.get_text() for text in artist.findobj(matplotlib.text.Text) if text.get_text()]


def axes_of(comparison, *names):
    return plot.figure(comparison, *names).axes


def dots(comparison):
    """Label of the layer, place and line of each dot over its bound."""
    (axes,) = axes_of(comparison, "bounds")
    names = [label.get_text() for label in axes.get_yticklabels()]
    labels = dict(zip(axes.get_yticks(), names, strict=True))
    lines = [line for line in axes.lines if line.get_marker() != "None"]
    return [(labels[line.get_ydata()[0]], line.get_xdata()[0], line) for line in lines]


def keys(comparison):
    (axes,) = axes_of(comparison, "points")
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_what_is_out_of_bounds_has_another_place_colour_and_shape(agreeing, disagreeing):
    for comparison in (agreeing, disagreeing):
        drawn = dots(comparison)
        assert [name for name, *_ in drawn] == [row.label for row in comparison.rows]
        for (_, x, line), row in zip(drawn, comparison.rows, strict=True):
            assert x == min(max(row.bound_ratio, 1e-3), 1e3)
            assert (x <= 1, line.get_marker()) == (row.ok, "o" if row.ok else "X")
            assert (matplotlib.colors.to_rgba(line.get_color()) != RED) == row.ok
    assert not all(row.ok for row in disagreeing.rows)


@pytest.mark.parametrize(
    ("ratio", "x", "tick"),
    [(0.0, 1e-3, "≤ 0.001"), (1e-9, 1e-3, "≤ 0.001"), (np.inf, 1e3, "≥ 1000")],
)
def test_ratios_beyond_the_scale_are_drawn_at_its_end_which_says_so(agreeing, ratio, x, tick):
    one = replace(agreeing, rows=(replace(agreeing.rows[0], bound_ratio=ratio),))
    ((_, drawn, _),) = dots(one)
    (axes,) = axes_of(one, "bounds")
    assert drawn == x == axes.get_xlim()[ratio > 1]
    assert axes.get_xticklabels()[list(axes.get_xticks()).index(x)].get_text() == tick


def test_axes_have_names_and_a_logarithmic_one_says_so(agreeing):
    points, bounds, *ulps = axes_of(agreeing)
    assert (points.get_xlabel(), points.get_ylabel()) == ("first input", "second input")
    assert bounds.get_xscale() == "log"
    assert "logarithmic" in bounds.get_xlabel()
    assert bounds.get_ylabel() == "layer"
    assert len(ulps) == 2
    assert {axes.get_ylabel() for axes in ulps} == {"share"}
    assert "ULP (units in the last place)" in ulps[-1].get_xlabel()


@pytest.mark.parametrize("names", [(), ("bounds",)])
def test_every_picture_names_the_versions_the_machine_and_the_day(agreeing, names):
    (caption,) = [text for text in texts(plot.figure(agreeing, *names)) if "torch" in text]
    caption = " ".join(caption.split())
    for name, fact in agreeing.environment.items():
        assert f"{name} {fact}" in caption
    assert caption.endswith(f"Drawn on {date.today()}.")


def test_a_network_of_many_layers_shows_the_worst(agreeing):
    rows = [replace(agreeing.rows[0], bound_ratio=(1 + i) / 100) for i in range(100)]
    many = replace(agreeing, rows=tuple(rows))
    assert sorted(x for _, x, _ in dots(many)) == [(1 + i) / 100 for i in range(52, 100)]
    assert "Errors over their bounds, the largest 48 of 100" in texts(plot.figure(many, "bounds"))


def test_every_class_is_in_the_key_also_one_that_no_point_is_given(agreeing):
    counts = np.bincount(agreeing.output.argmax(-1), minlength=3)
    assert 0 in counts
    assert keys(agreeing) == [f"class {i}: {count} points" for i, count in enumerate(counts)]
    (axes,) = axes_of(agreeing, "points")
    drawn = [each for each in axes.collections if each.get_label().startswith("_")]
    assert [len(each.get_offsets()) for each in drawn] == list(counts)


def test_more_classes_than_colours_share_one(agreeing):
    many = replace(agreeing, output=np.eye(20)[np.arange(300) % 20])
    assert keys(many) == [
        *(f"class {i}: 15 points" for i in range(4)),
        "class 4 and up: 240 points",
    ]


def test_the_shades_say_what_they_span(agreeing):
    (axes,) = axes_of(agreeing, "points")
    title = axes.get_legend().get_title().get_text()
    shades = re.search(r"largest output: (\S+) \(faint\) to (\S+) \(strong\)", title)
    largest = agreeing.output.max(-1)
    assert [float(end) for end in shades.groups()] == pytest.approx(
        [largest.min(), largest.max()], abs=1e-8
    )
    alphas = np.concatenate([each.get_facecolor()[:, 3] for each in axes.collections])
    assert (alphas.min(), alphas.max()) == (0.25, 1.0)


def test_many_points_are_thinned_out_and_counted():
    comparison = compare(classifier(2, 3, 3), torch.randn(2000, 2), **PLAIN)
    (axes,) = axes_of(comparison, "points")
    assert sum(len(each.get_offsets()) for each in axes.collections) == 1500
    assert (
        "eager on cpu in float32, 1,500 of 2,000 points" in axes.get_legend().get_title().get_text()
    )


@pytest.mark.parametrize("value", [1 / 3, 0.0, -1.0])
def test_constant_outputs_have_a_picture(agreeing, value):
    assert keys(replace(agreeing, output=np.full_like(agreeing.output, value)))


def test_outputs_that_are_no_numbers_are_not_drawn(agreeing):
    output = agreeing.output.copy()
    output[:10, 1] = np.nan
    (axes,) = axes_of(replace(agreeing, output=output), "points")
    assert "290 of 300 points" in axes.get_legend().get_title().get_text()
    assert "points" not in plot.panels(replace(agreeing, output=output * np.nan))


def test_the_histograms_are_those_of_the_last_layers(agreeing, disagreeing):
    for comparison in (agreeing, disagreeing):
        last = [rows[-1] for rows in comparison.by_candidate.values()]
        for axes, row in zip(axes_of(comparison, "ulps"), last, strict=True):
            (bars,) = axes.containers
            assert [bar.get_height() for bar in bars] == pytest.approx(np.array(row.ulps) / 900)
            assert (bars[0].get_facecolor() != RED) == row.ok
            assert axes.get_title("left").endswith(", 3 Softmax")
        axes.get_figure(root=True).draw_without_rendering()
        assert [text.get_text() for text in axes.get_xticklabels()][1:3] == ["≤ 0.5", "≤ 1"]


def test_gradients_have_no_histogram_of_their_own(stream):
    points, target = spiral(generator=stream)
    both = compare(classifier(2, 3, 3), points, backward=True, target=target, **PLAIN)
    assert both.rows[-1].gradient
    (axes,) = axes_of(both, "ulps")
    assert axes.get_title("left") == "eager on cpu in float32, 3 Softmax"


@pytest.mark.parametrize("input", [torch.randn(7, 4), torch.randn(2)], ids=["4 features", "1-D"])
def test_other_inputs_have_no_points(input):
    comparison = compare(classifier(input.shape[-1], 3, 3), input, **PLAIN)
    assert list(plot.panels(comparison)) == ["bounds", "ulps"]
    assert len(axes_of(comparison)) == 2


@pytest.mark.parametrize(("name", "names"), [("1", ()), ("W" * 40, ()), ("1", ("points",))])
def test_no_text_is_cut_off_and_none_overlaps(agreeing, name, names):
    who = {"candidate": "exported", "device": "cuda:0", "dtype": "bfloat16"}
    rows = [replace(agreeing.rows[1], layer=name, bound_ratio=each, **who) for each in (1, 1e9)]
    whole = plot.figure(replace(agreeing, rows=(*agreeing.rows, *rows)), *names)
    whole.draw_without_rendering()
    hidden = [
        label
        for axes in whole.axes
        for axis in (axes.xaxis, axes.yaxis)
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
        if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
    ]
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in whole.findobj(matplotlib.text.Text)
        if text.get_text() and text.get_visible() and text not in hidden
    ]
    assert len(boxes) > 15
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 <= box.y0, text
        assert box.x1 <= whole.bbox.width, text
        assert box.y1 <= whole.bbox.height, text
        for other, another in boxes[i + 1 :]:
            assert not box.shrunk(0.9, 0.9).overlaps(another.shrunk(0.9, 0.9)), (text, other)


def test_formats(agreeing):
    assert plot.render(agreeing, "png", "bounds").startswith(b"\x89PNG\r\n")
    assert ElementTree.fromstring(plot.render(agreeing, "svg", "bounds")).tag.endswith("svg")
    assert [plot.kind_of(path) for path in ("a.png", "b.c/d.SVG")] == ["png", "svg"]
    with pytest.raises(ValueError, match=r"\.png or \.svg files, got 'a\.jpeg'"):
        plot.kind_of("a.jpeg")


def test_any_name_can_be_drawn(agreeing):
    names = ["$x^2", "<script>", "-->", "层", "\x00\x1b\ud800", "a\nb", "$$"]
    rows = tuple(replace(agreeing.rows[0], layer=name) for name in names)
    drawn = plot.render(replace(agreeing, rows=rows), "svg", "bounds")
    shown = {text.text for text in ElementTree.fromstring(drawn).findall(".//{*}text")}
    assert {"$x^2 Dense", "<script> Dense", "--> Dense", "层 Dense", "$$ Dense"} <= shown
    assert plot.render(replace(agreeing, rows=rows), "png", "bounds")


def test_settings_are_of_no_account_and_stay_as_they_are(agreeing):
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        drawn = plot.render(agreeing, "svg", "bounds")
        assert dict(matplotlib.rcParams) == before
    assert b"30px" not in drawn
    assert len(drawn) == len(plot.render(agreeing, "svg", "bounds"))


@pytest.mark.parametrize("keywords", [{}, {"dot_precision_workaround": False}])
def test_pictures_are_drawn_with_numpys_own_functions(agreeing, monkeypatch, keywords):
    own = [np.dot, np.eye, np.zeros]
    for module, name in [(np, "dot"), (np, "eye"), (np, "zeros"), (np.random, "randn")]:
        monkeypatch.setattr(module, name, getattr(module, name))
    for _ in range(2):
        nnfs.init(random_seed=None, **keywords)
    books = [np.dot, np.eye, np.zeros]
    with plot.own_numpy():
        assert [np.dot, np.eye, np.zeros] == own
    assert plot.render(agreeing, "svg", "bounds").startswith(b"<?xml")
    with pytest.raises(ValueError, match="boom"), plot.own_numpy():
        raise ValueError("boom")
    assert [np.dot, np.eye, np.zeros] == books != own


def test_without_matplotlib(agreeing, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plot.figure, lambda each: plot.render(each, "png")):
        with pytest.raises(MissingExtraError, match=r"pip install 'torchnnfs\[plot\]'"):
            draw(agreeing)
