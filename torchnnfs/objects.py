"""What a reader's own NumPy objects hold, and whether a layer computes what they compute."""

import copy
import inspect
import re
from typing import Any

import numpy as np
from torch import nn

#: What training leaves on a layer, and what links it to others: no part of its forward pass.
_STATE = re.compile(
    r"inputs?|outputs?|next|prev|name|trainable|binary_mask|d(inputs?|weights?|bias|biases|values)"
    r"|(weights?|bias|biases)_(momentums?|cache|regularizer_l[12])"
)
#: The kinds that are understood, and the names of what each of them is made from.
_KINDS: dict[str, list[tuple[str, ...]]] = {
    "dense": [("weights", "weight"), ("biases", "bias"), ("activation", "activation_function")],
    "relu": [],
    "softmax": [],
    "dropout": [("rate",)],
}
_HINT = "book.from_numpy converts no more than it understands; convert the parts one by one"


def read(layer: Any) -> tuple[str, list[Any]]:
    """The kind of `layer`, and what `_KINDS` says that it is made from.

    A TypeError names the class or the attribute that is not understood.
    """
    owner, names = type(layer).__name__, [] if isinstance(layer, type) else dir(layer)
    held = {
        name: value
        for name in names
        if not (name.startswith("__") or _STATE.fullmatch(name))
        and not callable(getattr(type(layer), name, None))
        and (value := getattr(layer, name)) is not None
    }
    has_weights = "weights" in held or "weight" in held
    kind = "dense" if has_weights else kind_of(layer)
    if kind not in _KINDS or (kind == "dense" and not has_weights):
        raise TypeError(
            "book.from_numpy expects an object with weights and biases, or of a class named like "
            f"Activation_ReLU, Activation_Softmax or Layer_Dropout, got one of class {owner}"
        )
    parts = []
    for spellings in _KINDS[kind]:
        parts.append(held.pop(next((name for name in spellings if name in held), ""), None))
    if kind == "dropout" and not (isinstance(parts[0], float | int) and 0 < parts[0] <= 1):
        raise TypeError(
            f"book.from_numpy expects {owner}.rate to be the share of the inputs that stays, above "
            f"0 and up to 1, got {parts[0]!r}"
        )
    if kind == "dense" and parts[2] is not None:
        activation, known = kind_of(parts[2]), [name for name in _KINDS if name != "dense"]
        if activation not in known:
            raise TypeError(
                f"{_HINT}: the activation {activation!r} of {owner} is none of {', '.join(known)}"
            )
    for name, value in held.items():
        # A number may be a setting of the training; `check_forward` shows whether it is.
        runs = hasattr(layer, "forward") and kind != "dropout" and isinstance(value, int | float)
        size = kind == "dense" and type(value) is int and value in np.shape(parts[0])
        if not (runs or size):
            raise TypeError(f"{_HINT}: {owner} has an attribute {name!r}, {value!r:.60}")
    return kind, parts


def kind_of(value: Any) -> str:
    """What a name, a function, a class or an object is called, without the words around it."""
    name = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
    return re.sub(r"activation|layer|function|_", "", name.lower())


def check_forward(layer: Any, model: nn.Module, width: int, scales: tuple[float, ...]) -> None:
    """A TypeError where `layer` has a `forward` that fails or computes something else."""
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
    bound = 1e-4 * np.abs(ours).max(-1, keepdims=True)
    if theirs.shape != ours.shape or not (np.abs(theirs - ours) <= bound).all():
        raise TypeError(f"{_HINT}: {owner} computes something else than {model}")
