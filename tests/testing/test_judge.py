"""What the judge says of traces made by hand: what is allowed, and in which words it says no."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import compare
from torchnnfs.testing.judge import find, find_formula, judge, row_of
from torchnnfs.testing.measure import measure, same
from torchnnfs.testing.merge import Finding
from torchnnfs.testing.precision import PRECISIONS
from torchnnfs.testing.problem import Problem
from torchnnfs.testing.reference import Answer, Reference
from torchnnfs.testing.traces import Call, Trace
from torchnnfs.testing.values import rows_in

#: A ReLU rounds nothing, but what is smaller may be flushed to zero: that is its whole bound.
TINY = 2.0**-126
X = np.array([[1.0, 2.0, 4.0], [8.0, 0.0, -1.0]])
Y = np.maximum(X, 0)


def problem(model, x=X, start=0, **reference):
    x = torch.tensor(x, dtype=torch.float32)
    return Problem(model, x, Reference(**reference), torch.float32, start)


def row(output, kind, isolated, chained, *more, **keywords):
    found = Finding("0", "0", "", kind, isolated, chained)
    return row_of(trace(output=output), found, *more, **keywords)


def trace(*steps, output=None, again=None, path="{}"):
    """From pairs of what went in and what came out."""
    calls = (Call(path.format(i), "ReLU", (x,), {}, y) for i, (x, y) in enumerate(steps))
    output = steps[-1][1] if output is None else output
    return Trace("mine", "cpu", "float32", tuple(calls), output, again)


def chain(n):
    return nn.Sequential(*(nn.ReLU() for _ in range(n)))


def changed(index, value, y=Y):
    y = y.copy()
    y[index] = value
    return y


@pytest.mark.parametrize(("times", "ok"), [(0.0, True), (1.0, True), (1.25, False)])
def test_an_error_as_large_as_its_bound_is_allowed(times, ok):
    (row,) = judge(trace((X, changed((1, 1), times * TINY))), problem(chain(1)))
    assert (row.ok, row.state) == (ok, "ok" if ok else "differs")
    ratios = row.isolated_ratio, row.chained_ratio, row.bound_ratio
    assert ratios == (times, times, times)


def test_all_that_a_row_says():
    (row,) = judge(trace((X, changed((0, 1), 2 + 2.0**-20))), problem(chain(1)))
    assert (row.candidate, row.device, row.dtype) == ("mine", "cpu", "float32")
    assert (row.layer, row.kind, row.label, row.gradient) == ("0", "ReLU", "0 ReLU", False)
    assert (row.state, row.basis, row.excess, row.unbounded) == ("differs", "rounding", None, 0)
    assert (row.max_abs, row.max_ulp, row.chained_ulp) == (2.0**-20, 4, 4)
    assert row.bit_equal == pytest.approx(5 / 6)
    assert row.bound_ratio == row.isolated_ratio == row.chained_ratio == 2.0**106
    assert (row.worst.index, row.worst.value, row.worst.expected) == ((0, 1), 2 + 2.0**-20, 2)
    assert sum(row.ulps) == 6
    assert row.reason == (
        "2.00000095 at [0, 1] where NumPy gives 2, 8.11e+31 times what rounding explains"
    )


def test_what_is_right_has_no_reason():
    (row,) = judge(trace((X, Y)), problem(chain(1)))
    assert (row.state, row.reason, row.bit_equal, row.max_ulp) == ("ok", "", 1.0, 0.0)
    assert row.ulps[0] == 6


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_is_infinitely_far(value):
    (row,) = judge(trace((X, changed((1, 0), value))), problem(chain(1)))
    assert row.reason == (
        f"{value} at [1, 0] where NumPy gives 8, infinitely far from what rounding explains"
    )


def test_another_shape_differs():
    (row,) = judge(trace((X, Y[:, :2])), problem(chain(1)))
    assert row.reason == "shape (2, 2) where NumPy gives shape (2, 3)"
    assert row.bound_ratio == math.inf


def test_a_layer_behind_one_that_differs_is_right_by_itself():
    wrong = changed((0, 0), 1.5)
    first, second, third = judge(
        trace((X, wrong), (wrong, wrong), (wrong, changed((0, 2), 3, wrong))), problem(chain(3))
    )
    assert [row.state for row in (first, second, third)] == [
        "differs", "right, but its input was wrong", "differs",
    ]  # fmt: skip
    assert second.isolated_ratio == 0
    assert second.chained_ratio > 1
    assert third.isolated_ratio == 1 / TINY
    assert third.reason.startswith("3 at [0, 2] where NumPy gives 4")


@pytest.mark.parametrize(
    ("times", "state"), [(1.0, "right, but its input was wrong"), (1.25, "differs")]
)
def test_behind_one_that_differs_the_bound_decides(times, state):
    wrong = changed((0, 0), 1.5)
    _, row = judge(
        trace((X, wrong), (wrong, changed((1, 1), times * TINY, wrong))), problem(chain(2))
    )
    assert (row.state, row.isolated_ratio) == (state, times)


def test_a_step_that_did_not_get_what_came_before_is_named():
    other = changed((0, 0), 1.5)
    first, second = judge(trace((X, Y), (other, other)), problem(chain(2)))
    assert first.ok
    assert (second.state, second.isolated_ratio) == ("differs", 0)
    words = "it computes right, but its input is not what the layer before it gave"
    assert second.reason == words
    # Of the first step, that is the input of the model.
    (row,) = judge(trace((other, other)), problem(chain(1)))
    assert (row.state, row.reason) == ("differs", words)
    # If it computes wrong as well, that is what is said.
    (row,) = judge(trace((other, changed((0, 0), 7.0))), problem(chain(1)))
    assert row.reason.startswith("7 at [0, 0] where NumPy gives 1")
    for times, right in ((1.0, True), (1.25, False)):
        (row,) = judge(trace((other, changed((1, 1), times * TINY, other))), problem(chain(1)))
        assert (row.reason == words) == right
    # The bits count, but no number is no number wherever it came from.
    nan = np.full((1, 1), np.nan)
    assert judge(trace((nan, nan)), problem(chain(1), nan))[0].reason == ""


def test_an_output_that_no_step_gave_has_a_row_of_its_own():
    rows = judge(trace((X, Y), output=changed((0, 0), 3.0)), problem(chain(1)))
    assert [row.label for row in rows] == ["0 ReLU", "(output) Sequential"]
    assert [row.ok for row in rows] == [True, False]
    assert rows[1].isolated_ratio is None
    # A trace without calls shows the end of the chain.
    (row,) = judge(trace(output=Y), problem(chain(2)))
    assert (row.label, row.ok, row.isolated_ratio, row.chained_ratio) == ("1 ReLU", True, None, 0)
    assert row.chained_ulp == 0


def test_a_layer_that_is_called_again_says_so():
    relu = nn.ReLU()
    calls = tuple(Call("0", "ReLU", (x,), {}, Y) for x in (X, Y))
    rows = judge(Trace("mine", "cpu", "float32", calls, Y), problem(nn.Sequential(relu, relu)))
    assert [row.layer for row in rows] == ["0", "0 (call 2)"]
    assert all(row.ok and row.chained_ratio == 0 for row in rows)


def test_calls_that_nobody_can_judge_have_no_row():
    other = Call("elsewhere", "Odd", (X,), {}, X)
    calls = (other, *trace((X, Y)).calls, other)
    rows = judge(Trace("mine", "cpu", "float32", calls, Y), problem(chain(1)))
    assert [row.layer for row in rows] == ["0"]


def test_two_runs_may_differ_by_twice_the_bound():
    once = problem(chain(1))
    for times, count in ((0, 1), (2, 1), (3, 2)):
        rows = judge(trace((X, Y), again=changed((1, 1), times * TINY)), once)
        assert len(rows) == count
    twice, row = rows
    assert (twice.label, twice.basis, twice.state) == (
        "(output) Sequential", "not the same twice", "differs",
    )  # fmt: skip
    assert twice.reason == (f"two runs on the same input gave 0 and {3 * TINY:.9g} at [1, 1]")
    assert row.ok  # a chance output makes no layer wrong


def test_two_runs_of_anything_may_differ_by_little():
    """Where no bound is known: 64 roundoffs of the largest number."""

    class Own(nn.Module):
        def forward(self, x):
            raise RuntimeError("only here")

    unit = 2.0**-24 + 2.0**-53
    for times, count in ((63, 0), (65, 1)):
        again = changed((1, 1), times * unit * 8)
        assert len(judge(trace(output=Y, again=again), problem(Own()))) == count


def test_excess_up_to_four_is_rounding():
    right = same(Y)
    assert row(Y, "Linear", right, right, 4.0).ok
    told = row(Y, "Linear", right, right, 4.5)
    assert (told.state, told.basis, told.excess) == ("differs", "excess", 4.5)
    assert told.reason == (
        "its errors are 4.5 times those of plain sums in float32; up to 4 is rounding"
    )


def test_a_row_of_its_own_knows_of_no_wrong_input():
    right = same(Y)
    off = measure(Y, Y + 1, np.ones(Y.shape) / 2, PRECISIONS["float32"])
    off = replace(off, basis="estimated", source="I")
    told = row(Y, "ReLU", right, off)
    assert (told.state, told.basis) == ("differs", "estimated")
    assert (told.max_abs, told.chained_ulp) == (0, 2**23)
    assert row(Y, "ReLU", right, off, wrong=True).state == "right, but its input was wrong"
    told = row(Y, "ReLU", None, off)
    assert (told.isolated_ratio, told.chained_ratio, told.max_abs) == (None, 2, 1)
    told = row(Y, "ReLU", off, None)
    assert (told.isolated_ratio, told.chained_ratio, told.chained_ulp) == (2, None, None)
    assert told.reason == "1 at [0, 0] where I gives 2, 2 times what rounding explains"


def test_what_has_no_elements_is_right():
    nothing = np.zeros((0, 3))
    empty = measure(nothing, nothing, nothing, PRECISIONS["float32"])
    told = row(nothing, "ReLU", empty, empty)
    assert (told.state, told.bit_equal, told.unbounded) == ("ok", 1.0, 0)


def linear_trace(layer, x):
    with torch.no_grad():
        y = layer(torch.tensor(x, dtype=torch.float32)).double().numpy()
    return Trace("mine", "cpu", "float32", (Call("", "Linear", (x,), {}, y),), y)


@pytest.mark.parametrize(
    ("layer", "shape", "kept"),
    [
        (nn.Linear(1, 1), (1000, 1), 1000),
        (nn.Linear(1, 1), (1001, 1), 501),  # every other one
        (nn.Linear(1024, 1024), (64, 1024), 64),
        (nn.Linear(1024, 1024), (65, 1024), 33),  # a product has 2^20 terms for each
        (nn.Linear(2, 3), (2, 5, 2), 10),
    ],
)
def test_plain_sums_are_made_for_as_many_rows_as_are_enough(layer, shape, kept):
    x = np.float32(np.random.RandomState(0).randn(*shape)).astype(float)
    (found,) = find(linear_trace(layer, x), problem(layer, x))
    assert len(found.sample.rows) == kept
    assert [len(each) for each in found.sample.arrays] == [kept] * 3


def test_plain_sums_of_a_batch_are_of_its_rows_of_the_whole():
    layer, x = nn.Linear(2, 3), np.ones((2, 5, 2))
    (found,) = find(linear_trace(layer, x), problem(layer, x, start=6))
    np.testing.assert_array_equal(found.sample.rows, range(30, 40))


def test_plain_sums_are_made_where_they_can_be_compared():
    layer, x = nn.Linear(2, 3), np.ones((4, 2))
    right = linear_trace(layer, x)
    call = Call("", "Linear", (x,), {}, right.output[:2])
    (found,) = find(Trace("mine", "cpu", "float32", (call,), call.output), problem(layer, x))
    assert found.sample is None
    (found,) = find(trace((X, Y)), problem(chain(1)))
    assert found.sample is None  # a ReLU rounds nothing
    output = changed((0, 0), np.nan, right.output)
    call = Call("", "Linear", (x,), {}, output)
    (row,) = judge(Trace("mine", "cpu", "float32", (call,), output), problem(layer, x))
    assert not row.ok
    assert row.excess < 4  # of the others
    huge = nn.Linear(1, 1, bias=False)
    nn.init.constant_(huge.weight, 2.0)
    x = np.float32([[3e38]]).astype(float)
    call = Call("", "Linear", (x,), {}, np.array([[np.inf]]))
    (row,) = judge(Trace("mine", "cpu", "float32", (call,), call.output), problem(huge, x))
    assert (row.ok, row.excess) == (True, None)


def test_rows_are_counted_from_the_beginning_of_the_whole():
    (found,) = find(trace((X, changed((1, 0), 9))), problem(chain(1), start=70))
    assert found.isolated.worst.index == (71, 0)
    # An output that has no rows is counted from 0.
    (found,) = find(trace(output=X.sum(0) + 9 * np.eye(3)[2]), problem(Total(), start=70))
    assert found.chained.worst.index == (2,)
    recorded = {"": Answer(changed((1, 0), 9), PRECISIONS["float64"])}
    for start in (0, 70):
        _, (found,) = find_formula(problem(chain(1), start=start, recorded=recorded))
        assert found.chained.worst.index == (start + 1, 0)
        assert found.remark.startswith("in float64 this is no rounding: the code or the parameters")
    assert find_formula(problem(chain(1))) is None


def test_where_all_may_overflow_nothing_is_judged():
    layer = nn.Linear(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0], [1.0]]))
        layer.bias.copy_(torch.tensor([-3e38, 0.0]))
    x = np.float32([[2e38]]).astype(float)
    layer.weight.requires_grad_(False)
    both = problem(layer, x)
    y = np.array([[5.0, x[0, 0]]])
    (row,) = judge(Trace("mine", "cpu", "float32", (Call("", "Linear", (x,), {}, y),), y), both)
    assert (row.ok, row.unbounded) == (True, 1)
    one = nn.Linear(1, 1)
    one.load_state_dict({name: value[:1] for name, value in layer.state_dict().items()})
    call = Call("", "Linear", (x,), {}, y[:, :1])
    (row,) = judge(Trace("mine", "cpu", "float32", (call,), y[:, :1]), problem(one, x))
    assert (row.state, row.unbounded) == ("not judged", 1)
    assert row.reason == "no error can be told from rounding: float32 may overflow or cancel out"


def test_rows_are_those_of_the_first_array():
    assert rows_in(np.zeros((3, 2))) == 3
    assert rows_in({"a": np.zeros((4, 2)), "b": np.zeros(9)}) == 4
    assert rows_in(np.zeros(())) == rows_in(()) == 1


class Total(nn.Module):
    """Own code that adds up the rows."""

    def forward(self, x):
        return x.sum(0)


class Two(nn.Module):
    """Own code with two outputs."""

    def forward(self, x):
        return {"sum": x.sum(-1), "double": 2 * x}


def test_each_array_of_an_output_has_a_row():
    x = torch.tensor(X, dtype=torch.float32)
    rows = compare(Two(), x, candidates=["eager"], controls=False).rows
    assert [row.label for row in rows] == ["(output)['sum'] Two", "(output)['double'] Two"]
    told = problem(Two())
    (row,) = judge(trace(output={"sum": X.sum(-1)}), told)  # the numbers of arrays are compared
    assert row.reason == "1 array where its own float64 run gives 2 arrays (['sum'], ['double'])"
    assert (row.label, row.ok) == ("(output)['sum'] Two", False)


def test_other_names_are_another_structure():
    model = nn.Sequential(Two())
    outputs = {"sum": X.sum(-1), "twice": 2 * X}
    call = Call("0", "Two", (X,), {}, outputs)
    rows = judge(Trace("mine", "cpu", "float32", (call,), outputs), problem(model))
    assert rows[0].layer == "0's structure"
    told = (
        "arrays at ['sum'], ['twice'] where its own float64 run gives them at ['sum'], ['double']"
    )
    assert rows[0].reason == told


def test_a_reference_of_another_shape_has_the_largest_bound_of_the_model():
    recorded = {"": Answer(Y[:1], PRECISIONS["float32"])}
    for off, ok in ((TINY, True), (0.5, False)):
        output = Y[:1] + off * np.eye(1, 3)
        (row,) = judge(trace(output=output), problem(chain(1), recorded=recorded))
        assert row.ok == ok


def test_own_code_with_a_reference_has_one_row_for_its_output():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(x) + 1

    x = torch.tensor(X, dtype=torch.float32)
    keywords = {"candidates": ["eager"], "controls": False}
    rows = compare(Own(), x, reference=lambda x: np.maximum(x, 0) + 1, **keywords).rows
    labels = [(row.candidate, row.label) for row in rows]
    assert labels == [
        ("eager", "relu ReLU"), ("eager", "(output) Own"), ("the model", "(output) Own"),
    ]  # fmt: skip
    assert rows[0].chained_ratio is None


@pytest.mark.parametrize(
    ("candidate", "reference", "words"),
    [
        (Y, changed((0, 0), 9), "the candidate computes what the model's own layers and"),
        (changed((0, 0), 9), Y, "the candidate is far from the model's own layers and"),
        (changed((1, 1), 1.5 * TINY), changed((1, 1), -TINY), "the candidate is far"),
        (changed((1, 1), TINY), changed((1, 1), -1.5 * TINY), "the candidate computes what"),
        (changed((1, 1), 1.5 * TINY), changed((1, 1), -1.5 * TINY), "both are far"),
        (
            changed((0, 0), 9), changed((0, 0), 5),
            "both are far from the model's own layers and parameters in float64 "
            "(6.8e+38 times the bound for the candidate, 3.4e+38 for the reference)",
        ),
    ],
)  # fmt: skip
def test_beside_a_reference_it_is_said_who_is_far_from_the_model(candidate, reference, words):

    recorded = {"": Answer(reference, PRECISIONS["float32"])}
    rows = judge(trace(output=candidate), problem(chain(1), recorded=recorded))
    (row,) = rows
    assert row.label == "(output) Sequential"
    assert f"; {words}" in row.reason
    assert row.reason.count(";") == 1


def test_where_nothing_is_judged_nothing_is_said_to_differ():
    nowhere = replace(same(np.zeros(3)), unbounded=3)
    found = Finding("", "(output)", "", "ReLU", None, nowhere, remark="the code differs")
    told = row_of(trace(output=np.zeros(3)), found)
    assert told.state == "not judged"
    assert told.reason == "no error can be told from rounding: float32 may overflow or cancel out"
