"""Run the candidates, judge their traces, and give the verdict."""

import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchnnfs.testing import golden, html, plot, report
from torchnnfs.testing.candidates import Candidate
from torchnnfs.testing.files import write_whole
from torchnnfs.testing.inputs import check_input, check_model
from torchnnfs.testing.models import walk
from torchnnfs.testing.outcome import Outcome
from torchnnfs.testing.precision import Array
from torchnnfs.testing.reference import read
from torchnnfs.testing.run import Run
from torchnnfs.testing.traces import Trace


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Outcome):
    """The outcome of `compare`: what it found, and the reports of it.

    Attributes:
        traces: all that the candidates showed; empty where the input came in batches.
        setting: what the run depends on: input, parameters, layers; None where it came in batches.
    """

    traces: tuple[Trace, ...] = field(repr=False)
    setting: dict[str, Array] | None = field(repr=False)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        return report.verdict(self)

    def to_json(self) -> str:
        """Everything but the arrays as JSON; infinity and NaN are "Infinity" and "NaN" there."""
        first = self.first_divergence
        document = {
            "ok": self.ok,
            "verdict": self.verdict,
            "first_divergence": first and self.rows.index(first),
            "unjudged": self.unjudged,
            "environment": self.environment,
            "notes": self.notes,
            "rows": [{**asdict(row), "ok": row.ok} for row in self.rows],
            "controls": [asdict(control) for control in self.controls],
        }
        named = json.loads(json.dumps(document), parse_constant=str)
        return json.dumps(named, indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """The report for a pull request: the verdict, the table, the remarks."""
        return report.as_markdown(self)

    def save_html(self, path: str) -> None:
        """Write the report as one page that needs nothing else.

        Raises:
            ValueError: the file cannot be written.
        """
        write_whole(path, html.page(self).encode())

    def save_plot(self, path: str) -> None:
        """Write the verdict as a picture, ``.png`` or ``.svg``.

        Raises:
            MissingExtraError: without matplotlib.
            ValueError: another kind of file, or one that cannot be written.
        """
        write_whole(path, plot.render(self, plot.kind_of(path)))

    def save_golden(self, path: str) -> None:
        """Write what the candidates gave to an ``.npz`` file for `compare` on another machine.

        Raises:
            ValueError: the file cannot be written; the input came in batches.
        """
        if self.setting is None:
            raise ValueError(
                "save_golden expects a comparison of one tensor, tuple or dict, got one of "
                "batches, whose results are not kept; join the batches with torch.cat"
            )
        write_whole(path, golden.content(self.setting, self.traces, self.environment))

    def __repr__(self) -> str:
        return f"<Comparison: {self.verdict}>"

    def __str__(self) -> str:
        return report.as_text(self)

    def _repr_html_(self) -> str:
        return html.fragment(self)


def compare(
    model: nn.Module,
    input: Tensor | tuple[Any, ...] | dict[str, Any] | Iterable[Any],
    *,
    reference: Any = None,
    candidates: Sequence[str | Candidate] | None = None,
    golden_file: str | None = None,
    backward: bool = False,
    target: Tensor | None = None,
    controls: bool = True,
    progress: Callable[[str], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Comparison:
    """Judge, layer by layer, whether `model` computes what NumPy, or a reference, computes.

    First every candidate computes the model and leaves a trace: what went into and out of each
    layer. Then each trace is judged against the exact result, in float64 on the same parameters and
    input as the candidate's dtype stores them. An error is measured against what rounding can
    explain (`torchnnfs.testing.layers`): once with each layer *isolated*, on the input it really
    got, and once *chained*, from the model's input on. The model itself is not changed.

    A layer whose type is known is judged against its formula. A module with a forward of its own is
    judged against its own float64 run: that shows faults of rounding, not a wrong formula, so
    `Comparison.unjudged` names it unless a reference is given. Every candidate runs twice.

    Args:
        model: any module whose output is a tensor, or tensors in tuples, lists and dictionaries.
            Known are `nn.Linear`, `Conv1d`, `Conv2d`, `Embedding`, `ReLU`, `LeakyReLU`, `Tanh`,
            `Sigmoid`, `GELU`, `Softmax`, `LogSoftmax`, `LayerNorm`, `BatchNorm1d` and `2d`,
            `MaxPool2d`, `AvgPool2d`, `Flatten`, `Identity`, `Dropout` (the last and batch
            normalisation in eval mode), what derives from them, and types that
            `torchnnfs.testing.register` was told of.
        input: the model's input: a tensor, a tuple of its arguments, or a dictionary of its keyword
            arguments. Floating-point numbers are finite. Any other iterable, such as a
            `torch.utils.data.DataLoader`, gives batches of these, whose first axis counts the rows;
            a batch that is a list is an input and its target, as data loaders give them. Only one
            batch is in memory at a time.
        reference: what to compare with instead of the model itself. A module: its layers and
            parameters, or, if it has other layers, its output. A function of arrays, or an object
            whose ``forward`` returns its result or sets ``output``: its output for the same input.
            A list of such objects: they are run in order; as many as layers judge these as well. An
            array: the output, recorded elsewhere. A mapping from paths in the model ("" is the
            output) to arrays, functions or objects.
        candidates: names, which stand for every device of this machine, or `Candidate` objects;
            default "eager" in the model's own dtype, and "numpy" where that is float32.
        golden_file: a file of `Comparison.save_golden`, made from the same model and input, whose
            traces are judged as well.
        backward: whether to judge the gradients of torch eager as well, of the cross-entropy of
            `target` averaged over the batch: to the output, and to the input and parameters of
            each layer.
        target: (N,) classes of all rows, for `backward`; without it those that come with batches.
        controls: whether to show that broken copies of the model are rejected.
        progress: called with a few words before each step.
        group: the processes of `torch.distributed` that call `compare` with the same arguments.
            They share the batches out, and each gets the whole result.

    Raises:
        MissingExtraError: a candidate whose packages are not installed.
        TypeError: a `model` that is no module; an `input` that is no tensor; a `reference` that
            neither computes nor holds numbers.
        ValueError: an `input` that is empty, not finite or on the meta device; parameters that are
            not finite or on the meta device; layers in training mode that depend on chance; a
            reference that cannot compute; a model whose forward fails, with what it raised as the
            cause; an unknown candidate; `backward` without a fitting
            `target`, or with a reference whose layers cannot be paired; a golden file with batches;
            no batch, or one in another dtype than the first; an array as reference, or a `target`,
            that has other rows than the batches.

    Example:
        >>> import torch
        >>> from torchnnfs import classifier, compare, spiral
        >>> comparison = compare(classifier(2, 3, 3), spiral()[0], candidates=["eager"])
        >>> comparison.ok, comparison.first_divergence, comparison.unjudged
        (True, None, ())
    """
    check_model("model", model)
    if isinstance(reference, nn.Module):
        check_model("reference", reference)
    one = isinstance(input, Tensor | tuple | dict)
    if not one and golden_file is not None:
        raise ValueError(
            "compare with a golden file, which holds a whole run, expects one batch, a tensor, "
            f"tuple or dict, got an iterable ({type(input).__name__}); take fewer rows, or join "
            "the batches with torch.cat"
        )
    batches = iter([[input]]) if one else _batches(input)
    read_from = read(reference, model, walk(model))
    tell = progress or (lambda words: None)
    run = Run(model, read_from, candidates, backward, target, tell, group, one)
    # A dtype may overflow: that is judged, and no reason to warn.
    with np.errstate(all="ignore"), _untouched_chance():
        for given, *classes in batches:
            run.take(given, classes[0] if classes else None)
        outcome = run.finish(golden_file, controls)
    return Comparison(**vars(outcome), traces=tuple(run.traces), setting=run.setting)


def _batches(input: Any) -> Iterator[list[Any]]:
    """What a data loader gives: a list is an input and its target."""
    if not isinstance(input, Iterable):
        check_input(input)  # which says what is expected
    for batch in input:
        if isinstance(batch, list) and len(batch) > 2:
            raise ValueError(
                "compare expects a batch that is a list to be an input and its target, got "
                f"{len(batch)} entries; several inputs are a tuple"
            )
        yield batch if isinstance(batch, list) and batch else [batch]


def assert_agrees(
    model: nn.Module,
    input: Tensor | tuple[Any, ...] | dict[str, Any] | Iterable[Any],
    **keywords: Any,
) -> None:
    """`compare` with the same arguments, for test suites; without controls unless asked for.

    Warns, as a `UserWarning`, of parts of the model that nothing independent judged.

    Raises:
        AssertionError: with the verdict and the whole table, when a layer strays further than
            rounding explains.

    Example:
        >>> from torchnnfs import classifier, spiral
        >>> assert_agrees(classifier(2, 3, 3), spiral()[0])
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    comparison = compare(model, input, **{"controls": False, **keywords})
    if not comparison.ok:
        raise AssertionError(f"{comparison.verdict}\n\n{comparison}")
    if comparison.unjudged:
        warnings.warn(comparison.verdict, UserWarning, stacklevel=2)


@contextmanager
def _untouched_chance() -> Any:
    """Leave the global random streams where they were; a model or a library may draw from them."""
    state, pythons = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(state)
        random.setstate(pythons)
