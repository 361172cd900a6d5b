"""What benchmark.py measures: the same network, and its training step, in everything at hand."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchnnfs import book_numpy, classifier, fuse, to_torch

Call = Callable[[], Any]
BOOK = "book's NumPy"
COPY = "copy of as many bytes"


def arrays(model: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases as the book stores them."""
    dense = [layer for layer in model if isinstance(layer, nn.Linear)]
    return [
        (
            np.ascontiguousarray(each.weight.detach().cpu().numpy().T),
            each.bias.detach().cpu().numpy(),
        )
        for each in dense
    ]


def numpy_forward(layers: list, x: np.ndarray, dot: Callable = np.dot) -> np.ndarray:
    *hidden, last = layers
    for weights, biases in hidden:
        x = np.maximum(0, dot(x, weights) + biases)
    x = dot(x, last[0]) + last[1]
    powers = np.exp(x - np.max(x, axis=1, keepdims=True))
    return powers / np.sum(powers, axis=1, keepdims=True)


def numba_forward(widths: list[int]) -> Callable[..., np.ndarray]:
    """By hand: all layers of a sample in one loop, widths as constants, samples in parallel."""
    import numba

    zero = np.float32(0)
    inputs, classes, layers = widths[0], widths[-1], len(widths) - 1
    second, hidden = widths[1], widths[-2]

    def forward(x, w1, b1, w2, b2, w3, b3):
        output = np.empty((x.shape[0], classes), np.float32)
        for s in numba.prange(x.shape[0]):
            h, g = np.empty(second, np.float32), np.empty(hidden, np.float32)
            for j in range(second):
                total = b1[j]
                for i in range(inputs):
                    total += x[s, i] * w1[i, j]
                h[j] = max(total, zero)
            if layers == 3:
                for j in range(hidden):
                    total = b2[j]
                    for i in range(second):
                        total += h[i] * w2[i, j]
                    g[j] = max(total, zero)
            else:
                for j in range(second):
                    g[j] = h[j]
            y = np.empty(classes, np.float32)
            top = np.float32(-np.inf)
            for j in range(classes):
                total = b3[j]
                for i in range(hidden):
                    total += g[i] * w3[i, j]
                y[j] = total
                top = max(top, total)
            scale = zero
            for j in range(classes):
                y[j] = math.exp(y[j] - top)
                scale += y[j]
            for j in range(classes):
                output[s, j] = y[j] / scale
        return output

    return numba.njit(fastmath=True, parallel=True)(forward)


def on_cpu(model: nn.Sequential, widths: list[int], input: Tensor) -> Iterator[tuple[str, Call]]:
    """The peers that compute on a CPU alone; one that fails to import is passed over."""
    x, layers = input.numpy(), arrays(model)
    with book_numpy():
        book_dot = np.dot
    yield BOOK, lambda: numpy_forward(layers, x, book_dot)
    yield "NumPy float32", lambda: numpy_forward(layers, x)
    if is_here("onnxruntime", "onnxscript"):
        yield "ONNX Runtime", onnx_session(model, input)
    if is_here("jax"):
        import jax

        def forward(x, layers):
            for weights, biases in layers[:-1]:
                x = jax.nn.relu(x @ weights + biases)
            return jax.nn.softmax(x @ layers[-1][0] + layers[-1][1], -1)

        compiled, given = jax.jit(forward), jax.device_put((x, layers))
        yield "JAX", lambda: compiled(*given).block_until_ready()
    if is_here("numba") and len(widths) in (3, 4):
        run = numba_forward(widths)
        first, last = layers[0], layers[-1]
        middle = layers[1] if len(widths) == 4 else first
        flat = [*first, *middle, *last]
        yield "numba", lambda: run(x, *flat)


def is_here(*packages: str) -> bool:
    try:
        for package in packages:
            version(package)
    except PackageNotFoundError:
        return False
    return True


def onnx_session(model: nn.Module, input: Tensor) -> Call:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        model,
        (input[:2],),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: input.numpy()}
    return lambda: session.run(None, given)


def graph(model: nn.Module, input: Tensor) -> Call:
    """Eager torch as a CUDA graph, which replays kernels without the calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(input)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        model(input)
    return captured.replay


def peers(widths: list[int], input: Tensor, wanted: list[str] | None) -> dict[str, Call]:
    """Everything that computes the same network on the same input, compiled and warm."""
    torch.manual_seed(0)
    ours = classifier(*widths, device=input.device)
    eager = to_torch(ours)
    torch._dynamo.reset()
    faster = torch.compile(eager, dynamic=False)
    tuned = torch.compile(to_torch(ours), dynamic=False, mode="max-autotune-no-cudagraphs")
    one_pass = fuse(ours)
    out = torch.empty(*input.shape[:-1], widths[-1], device=input.device)
    source = torch.empty((input.numel() + out.numel()) // 2, device=input.device).normal_()
    target = torch.empty_like(source)
    found: dict[str, Call] = {
        "fused": lambda: one_pass(input),
        "fused, out=": lambda: one_pass(input, out=out),
        "torch eager": lambda: eager(input),
        "torch.compile": lambda: faster(input),
        "torch.compile max-autotune": lambda: tuned(input),
    }
    if wanted:
        found = {name: found[name] for name in found if name in wanted}
    elif input.is_cuda:
        found["CUDA graph of eager"] = graph(eager, input)
    else:
        found.update(on_cpu(eager, widths, input))
    expected = eager(input[:1000]).cpu().numpy()
    for name, call in found.items():
        given = call()
        if given is not None:  # a graph gives nothing back
            first = (given[0] if isinstance(given, list) else given)[:1000]
            got = first.cpu().numpy() if isinstance(first, Tensor) else np.asarray(first)
            if not np.allclose(got, expected, rtol=1e-4, atol=1e-6):  # the same network at all?
                raise SystemExit(f"{name} computes something else")
    found[COPY] = lambda: target.copy_(source)
    return found


def numpy_training(layers: list, x: np.ndarray, target: np.ndarray, dot: Callable = np.dot) -> Call:
    """Loss and gradients of the mean cross-entropy, as the book's readers write them by hand."""
    rows = np.arange(len(x))

    def step() -> tuple[float, list[np.ndarray]]:
        inputs = [x]
        for weights, biases in layers[:-1]:
            inputs.append(np.maximum(0, dot(inputs[-1], weights) + biases))
        z = dot(inputs[-1], layers[-1][0]) + layers[-1][1]
        powers = np.exp(z - np.max(z, axis=1, keepdims=True))
        p = powers / np.sum(powers, axis=1, keepdims=True)
        loss = np.mean(-np.log(np.clip(p[rows, target], 1e-7, 1 - 1e-7)))
        d = p
        d[rows, target] -= 1
        d /= len(x)
        found = []
        for index in range(len(layers) - 1, -1, -1):
            found += [np.sum(d, axis=0, keepdims=True), dot(inputs[index].T, d)]
            if index:
                d = dot(d, layers[index][0].T)
                d[inputs[index] <= 0] = 0
        return loss, found[::-1]

    return step


def training_peers(widths: list[int], input: Tensor, wanted: list[str] | None) -> dict[str, Call]:
    """Forward and backward of the mean cross-entropy in each; all compute the same gradients."""
    torch.manual_seed(0)
    ours = classifier(*widths, device=input.device)
    target = torch.randint(widths[-1], (len(input),), device=input.device)
    copies = [to_torch(ours) for _ in range(3)]
    one_pass, logits = fuse(ours), fuse(copies[0][:-1])
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t: F.cross_entropy(copies[2][:-1](x), t), dynamic=False, fullgraph=True
    )

    def step(model: nn.Module, loss: Call) -> Call:
        parameters = list(model.parameters())  # looking for them is no part of the step

        def run() -> list[Tensor]:
            for parameter in parameters:
                parameter.grad = None
            loss().backward()
            return [parameter.grad for parameter in parameters]

        return run

    found: dict[str, Call] = {
        "fused.cross_entropy": step(ours, lambda: one_pass.cross_entropy(input, target)),
        "fused": step(copies[0], lambda: F.cross_entropy(logits(input), target)),
        "torch eager": step(copies[1], lambda: F.cross_entropy(copies[1][:-1](input), target)),
        "torch.compile": step(copies[2], lambda: compiled(input, target)),
    }
    expected = [each.cpu().clone() for each in found["torch eager"]()]
    if not input.is_cuda:
        layers, x, classes = arrays(ours), input.numpy(), target.numpy()
        by_hand = numpy_training(layers, x, classes)
        if not np.allclose(by_hand()[1][0], expected[0].numpy().T, rtol=1e-3, atol=1e-6):
            raise SystemExit("NumPy by hand computes something else")
        found["NumPy by hand"] = by_hand
        with book_numpy():
            book_dot = np.dot
        found[BOOK + ", by hand"] = numpy_training(layers, x, classes, book_dot)
        if is_here("jax"):
            import jax

            def loss(layers: list, x: Any, t: Any) -> Any:
                for weights, biases in layers[:-1]:
                    x = jax.nn.relu(x @ weights + biases)
                z = jax.nn.log_softmax(x @ layers[-1][0] + layers[-1][1], -1)
                return -jax.numpy.take_along_axis(z, t[:, None], 1).mean()

            both, given = jax.jit(jax.value_and_grad(loss)), jax.device_put((layers, x, classes))
            found["JAX"] = lambda: jax.block_until_ready(both(*given))
    if wanted:
        found = {name: found[name] for name in found if name in wanted}
    for name, call in found.items():
        got = call()
        if isinstance(got, list):
            for ours_, theirs in zip(got, expected, strict=True):
                if not torch.allclose(ours_.cpu(), theirs, rtol=1e-3, atol=1e-6):
                    raise SystemExit(f"{name} computes other gradients")
    return found
