import sys
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import ReLU, classifier, compare, spiral
from torchnnfs.testing import plot
from torchnnfs.testing.candidates import MissingExtraError

RED = matplotlib.colors.to_rgba("#D55E00")


class LeakyReLU(ReLU):
    def forward(self, input):
        return torch.where(input > 0, input, 0.01 * input)


def compared(*, leaky=False, samples=100, classes=3, name="1", **keywords):
    stream = np.random.RandomState(0)
    points, _ = spiral(samples, classes, generator=stream)
    model = classifier(2, 3, classes, generator=stream)
    layers = {**model._modules, "1": LeakyReLU() if leaky else model[1]}
    judged = nn.Sequential()
    for path, layer in layers.items():
        judged.add_module(name if path == "1" else path, layer)
    return compare(judged, points, reference=model, controls=False, **keywords)


@pytest.fixture(scope="module")
def agreeing():
    return compared()


@pytest.fixture(scope="module")
def disagreeing():
    return compared(leaky=True)


def texts(artist):
    return [text.get_text() for text in artist.findobj(matplotlib.text.Text) if text.get_text()]


def dots(whole):
    """Label of the layer, place and colour of each dot over its bound."""
    axes = next(axes for axes in whole.axes if axes.get_xscale() == "log")
    labels = dict(
        zip(axes.get_yticks(), [t.get_text() for t in axes.get_yticklabels()], strict=True)
    )
    return [
        (labels[line.get_ydata()[0]], line.get_xdata()[0], line)
        for line in axes.lines
        if line.get_marker() != "None"
    ]


def test_every_layer_is_left_of_its_bound_when_it_agrees(agreeing):
    drawn = dots(plot.figure(agreeing, "bounds"))
    assert [name for name, *_ in drawn] == ["0 Dense", "1 ReLU", "2 Dense", "3 Softmax"] * 2
    for (_, x, line), row in zip(drawn, agreeing.rows, strict=True):
        assert x == row.bound_ratio <= 1
        assert matplotlib.colors.to_rgba(line.get_color()) != RED


def test_what_is_out_of_bounds_has_another_colour_and_shape(disagreeing):
    drawn = dots(plot.figure(disagreeing, "bounds"))
    for (_, x, line), row in zip(drawn, disagreeing.rows, strict=True):
        assert (x <= 1, line.get_marker()) == (row.ok, "o" if row.ok else "X")
        assert (matplotlib.colors.to_rgba(line.get_color()) != RED) == row.ok
    assert ">10000" in texts(plot.figure(disagreeing, "bounds"))


@pytest.mark.parametrize(
    ("ratio", "tick", "face"),
    [(0.0, "0", "w"), (1e-9, "<0.0001", "#0072B2"), (np.inf, ">10000", "#D55E00")],
)
def test_ratios_beyond_the_scale_are_drawn_at_its_edge(agreeing, ratio, tick, face):
    row = replace(agreeing.rows[0], bound_ratio=ratio)
    whole = plot.figure(replace(agreeing, rows=(row,)), "bounds")
    (axes,) = whole.axes
    ((_, x, line),) = dots(whole)
    assert x == axes.get_xlim()[ratio > 1]
    assert line.get_markerfacecolor() == face
    edge = axes.get_xticklabels()[list(axes.get_xticks()).index(x)]
    assert edge.get_text() == tick
    assert "1" in texts(axes)


def test_a_network_of_many_layers_shows_the_worst(agreeing):
    rows = [replace(agreeing.rows[0], bound_ratio=i / 100) for i in range(100)]
    whole = plot.figure(replace(agreeing, rows=tuple(rows)), "bounds")
    assert sorted(x for _, x, _ in dots(whole)) == [i / 100 for i in range(52, 100)]
    assert "Largest errors over bounds, 48 of 100" in texts(whole)


def test_the_shades_say_how_little_they_span(agreeing):
    axes, scale = plot.figure(agreeing, "points").axes
    assert sum(len(each.get_offsets()) for each in axes.collections) == 300
    low, high = (float(text.get_text()) for text in scale.get_xticklabels())
    largest = agreeing.output.max(-1)
    assert (low, high) == pytest.approx((largest.min(), largest.max()), abs=1e-6)
    assert high - low == pytest.approx(largest.max() - largest.min(), rel=0.05)
    assert scale.get_xlabel().endswith(f"the shades span {np.ptp(largest):.2g}")
    classes = [f"class {number}" for number in np.unique(agreeing.output.argmax(-1))]
    assert [text.get_text() for text in scale.get_yticklabels()] == classes


def test_many_points_are_thinned_out_and_counted():
    points = torch.randn(20_000, 2)
    comparison = compare(classifier(2, 3, 3), points, candidates=["eager"], controls=False)
    whole = plot.figure(comparison, "points")
    assert sum(len(each.get_offsets()) for each in whole.axes[0].collections) == 1500
    assert "eager on cpu in float32, 1,500 of 20,000 points" in texts(whole)


def test_more_classes_than_colours_share_one(agreeing):
    output = np.eye(20)[np.arange(300) % 20]
    whole = plot.figure(replace(agreeing, output=output), "points")
    assert [text.get_text() for text in whole.axes[1].get_yticklabels()][-1] == "others"
    assert len(whole.axes[0].collections) == 6


@pytest.mark.parametrize("value", [1 / 3, 0.0, -1.0])
def test_constant_outputs_have_a_picture(agreeing, value):
    output = np.full_like(agreeing.output, value)
    whole = plot.figure(replace(agreeing, output=output), "points")
    assert whole.axes[1].get_xlabel().endswith("the shades span 0")


def test_outputs_that_are_no_numbers_are_not_drawn(agreeing):
    output = agreeing.output.copy()
    output[:10, 1] = np.nan
    drawn = plot.figure(replace(agreeing, output=output), "points")
    assert "eager on cpu in float32, 290 of 300 points" in texts(drawn)
    assert "points" not in plot.panels(replace(agreeing, output=output * np.nan))


def test_the_histograms_add_up(agreeing, disagreeing):
    for comparison in (agreeing, disagreeing):
        (axes,) = plot.figure(comparison, "ulps").axes
        assert len(axes.containers) == 2
        for bars in axes.containers:
            assert sum(bar.get_height() for bar in bars) == pytest.approx(-0.45)
        assert [text.get_text() for text in axes.get_xticklabels()][:2] == ["0", "≤ 0.5"]


def test_a_candidate_without_layers_is_named_for_what_it_shows():
    shown = texts(plot.figure(compared(candidates=["eager", "exported"]), "ulps"))
    assert "eager on cpu in float32, last layer alone" in shown
    assert "exported on cpu in float32, whole network" in shown


def test_other_inputs_have_no_points():
    comparison = compare(classifier(4, 3, 3), torch.randn(7, 4), controls=False)
    assert list(plot.panels(comparison)) == ["bounds", "ulps"]
    assert len(plot.figure(comparison).axes) == 2
    single = compare(classifier(2, 3, 3), torch.randn(2), controls=False)
    assert list(plot.panels(single)) == ["bounds", "ulps"]


@pytest.mark.parametrize("ratios", [(0.5, 2.0), (0.0, 1e-9, 1e9), (0.3, np.inf), (1e-4, 20.0)])
@pytest.mark.parametrize("name", ["1", "W" * 40, "block.branch.12.activation"])
def test_no_text_is_cut_off_and_none_overlaps(agreeing, ratios, name):
    who = {"candidate": "exported", "device": "cuda:0", "dtype": "bfloat16"}
    row = replace(agreeing.rows[1], layer=name, **who)
    rows = [*agreeing.rows, *(replace(row, bound_ratio=ratio) for ratio in ratios)]
    whole = plot.figure(replace(agreeing, rows=tuple(reversed(rows))))
    whole.draw_without_rendering()
    hidden = [
        label
        for axes in whole.axes
        for axis in (axes.xaxis, axes.yaxis)
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
    ]
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in whole.findobj(matplotlib.text.Text)
        if text.get_text() and text.get_visible() and text not in hidden
    ]
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 <= box.y0, text
        assert box.x1 <= whole.bbox.width, text
        assert box.y1 <= whole.bbox.height, text
        for other, another in boxes[i + 1 :]:
            assert not box.shrunk(0.9, 0.9).overlaps(another.shrunk(0.9, 0.9)), (text, other)


def test_formats(agreeing):
    assert plot.render(agreeing, "png").startswith(b"\x89PNG\r\n")
    assert ElementTree.fromstring(plot.render(agreeing, "svg")).tag.endswith("svg")
    with pytest.raises(ValueError, match=r"\.png or \.svg files, got 'jpeg'"):
        plot.render(agreeing, "jpeg")


def test_gradients_have_no_histogram_of_their_own(stream):
    points, target = spiral(generator=stream)
    model = classifier(2, 3, 3, generator=stream)
    kept = {"candidates": ["eager"], "controls": False}
    forward = compare(model, points, **kept)
    both = compare(model, points, backward=True, target=target, **kept)
    assert plot.render(forward, "svg", "ulps") == plot.render(both, "svg", "ulps")


def test_the_same_comparison_gives_the_same_file(disagreeing):
    for kind in plot.KINDS:
        once = plot.render(disagreeing, kind)
        with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
            assert plot.render(disagreeing, kind) == once
    assert b"<dc:date>" not in once


@pytest.mark.parametrize("name", ["$x^2", "<script>", "-->", "层", "\x00\x1b\ud800", "a\nb", "$$"])
def test_any_name_can_be_drawn(name):
    comparison = compared(name=name, candidates=["eager"])
    ElementTree.fromstring(plot.render(comparison, "svg"))
    assert plot.render(comparison, "png")


def test_settings_stay_as_they_are(agreeing):
    before = dict(matplotlib.rcParams)
    plot.render(agreeing, "svg")
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib(agreeing, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plot.figure, lambda each: plot.render(each, "png")):
        with pytest.raises(MissingExtraError, match=r"pip install 'torchnnfs\[plot\]'"):
            draw(agreeing)
