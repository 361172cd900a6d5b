"""What a reader's own NumPy objects hold: arrays, activations, and what is not understood."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any, NamedTuple

import numpy as np
from torch import nn

#: What training leaves on a layer, and what links it to others: no part of its forward pass.
_STATE = re.compile(
    r"inputs?|outputs?|next|prev|name|trainable|binary_mask|d(inputs?|weights?|bias|biases|values)"
    r"|(weights?|bias|biases)_(momentums?|cache|regularizer_l[12])"
)
_HINT = "book.from_numpy converts no more than it understands; convert the parts one by one"


class Parts(NamedTuple):
    """What `read` finds: the arrays of a dense layer and what follows them, or a class by name."""

    weights: Any = None
    biases: Any = None
    activation: Any = None
    kind: str | None = None
    rate: float = 1.0


def read(layer: Any, kinds: list[str]) -> Parts:
    """The parts of `layer`: its arrays, or which of `kinds` its class is called after.

    Raises:
        TypeError: a class or an attribute that is not understood, by its name.
    """
    held = _attributes(layer)
    owner = type(layer).__name__
    weights = _pop(held, "weights", "weight")
    if weights is not None:
        biases = _pop(held, "biases", "bias")
        activation = _pop(held, "activation", "activation_function")
        if activation is not None and kind_of(activation) not in kinds:
            raise TypeError(
                f"{_HINT}: the activation {kind_of(activation)!r} of {owner} is none of "
                f"{', '.join(kinds)}"
            )
        found = Parts(weights, biases, activation)
        sizes = np.shape(weights)
        held = {name: value for name, value in held.items() if not _is_size(value, sizes)}
    elif kind_of(layer) in kinds:
        found = Parts(kind=kind_of(layer))
        if found.kind == "dropout":
            rate = held.pop("rate", None)
            if not isinstance(rate, float | int) or not 0 < rate <= 1:
                raise TypeError(
                    f"book.from_numpy expects {owner}.rate to be the share of the inputs that "
                    f"stays, above 0 and up to 1, as the book keeps it, got {rate!r}"
                )
            found = found._replace(rate=rate)
    else:
        raise TypeError(
            "book.from_numpy expects an object with weights and biases, or of a class named like "
            f"Activation_ReLU, Activation_Softmax or Layer_Dropout, got one of class {owner}"
        )
    for name, value in held.items():
        # A number may be a setting of the training; `check_forward` shows whether it is.
        runs = hasattr(layer, "forward") and found.kind != "dropout"
        if not (runs and isinstance(value, int | float)):
            raise TypeError(f"{_HINT}: {owner} has an attribute {name!r}, {value!r:.60}")
    return found


def kind_of(value: Any) -> str:
    """What a name, a function, a class or an object is called, without the words around it."""
    name = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
    return re.sub(r"activation|layer|function|_", "", name.lower())


def check_forward(layer: Any, model: nn.Module, width: int, scales: tuple[float, ...]) -> None:
    """Run a copy of `layer`, if it has a `forward`, beside `model`.

    Raises:
        TypeError: `forward` fails, gives nothing, or computes something else than `model`.
    """
    if isinstance(layer, type) or not hasattr(layer, "forward"):
        return
    owner = f"{type(layer).__name__}.forward"
    drawn = np.random.RandomState(0).randn(len(scales), 9, width)
    probe = (drawn * np.reshape(scales, (-1, 1, 1))).reshape(-1, width).astype(np.float32)
    state = np.random.get_state()
    try:
        layer = copy.deepcopy(layer)
        trains = "training" in inspect.signature(layer.forward).parameters
        with np.errstate(all="ignore"):
            theirs = layer.forward(probe, **({"training": False} if trains else {}))
        theirs = np.asarray(layer.output if theirs is None else theirs, np.float64)
    except Exception as error:
        raise TypeError(f"{_HINT}: {owner} fails on inputs of shape {probe.shape}") from error
    finally:
        np.random.set_state(state)
    ours = model(probe).detach().cpu().double().numpy()
    if (
        theirs.shape != ours.shape
        or not (np.abs(theirs - ours) <= 1e-4 * np.abs(ours).max(-1, keepdims=True)).all()
    ):
        raise TypeError(f"{_HINT}: {owner} computes something else than {model}")


def _attributes(layer: Any) -> dict[str, Any]:
    """What an object and its class hold, without methods and what `_STATE` names."""
    if isinstance(layer, type):
        return {}
    names = [
        name
        for name in dir(layer)
        if not (name.startswith("__") or _STATE.fullmatch(name))
        and not callable(getattr(type(layer), name, None))
    ]
    values = {name: getattr(layer, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _pop(held: dict[str, Any], *names: str) -> Any:
    """The first attribute of these names that there is, taken out, or None."""
    return next((held.pop(name) for name in names if name in held), None)


def _is_size(value: Any, sizes: tuple[int, ...]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in sizes
