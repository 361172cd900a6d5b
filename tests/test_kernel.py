"""How kernels are made, what happens without one, and the operation that torch sees."""

import importlib
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from torchnnfs import fuse, kernel
from torchnnfs.testing import assert_agrees


@pytest.fixture
def no_kernel(monkeypatch):
    """A C++ compiler that fails, and nothing that one compiled before."""

    caches = kernel.made, kernel.warn

    def forget():
        for cache in caches:
            cache.cache_clear()
        kernel.broken.clear()

    importlib.import_module("torch._inductor.config")  # torch.compile keeps the compiler it finds
    monkeypatch.setenv("CXX", "c++ -Dint=oops")
    forget()
    yield
    forget()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


COMPILERS = {
    "missing": ("no-such-compiler", r"there is no C\+\+ compiler 'no-such-compiler'; eager torch"),
    "empty": ("", r"there is no C\+\+ compiler ''; eager torch is used"),
    "fails": (None, r"the C\+\+ compiler failed \(.*error: "),
    "makes no file": ("true", "'true' made no library with a kernel in it"),
    "makes a file of another kind": (
        'while [ "$1" != -o ]; do shift; done; echo no > "$2"',
        "made no",
    ),
    "makes another library": (
        'echo \'int other;\' > "$0.cpp"; while [ "$1" != -o ]; do shift; done; '
        'c++ -shared -fPIC -o "$2" "$0.cpp"',
        "made no library with a kernel in it",
    ),
    "hangs": ("sleep 1000 & sleep 1000", "took longer than 0.2 seconds"),
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_without_a_kernel_there_is_one_warning(
    no_kernel, model, batch, kind, monkeypatch, tmp_path, lively, both
):
    text, warning = COMPILERS[kind]
    if text is not None:
        whole = " " in text
        monkeypatch.setenv("CXX", script(tmp_path / "compiler", text) if whole else text)
    if kind == "hangs":
        monkeypatch.setattr(kernel, "COMPILE_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match=warning) as caught:
        results = [both(fuse(each), batch) for each in (model, lively(2, 6, 3))]
    assert len(caught) == 1
    assert all(torch.equal(got, expected) for got, expected in results)
    assert fuse(model).formulation.split(",")[0] in ("eager", "torch.compile")
    assert time.monotonic() - start < 30


def test_nothing_is_left_on_disk(no_kernel, batch, monkeypatch, tmp_path, lively, both):
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    both(fuse(lively(2, 5, 3)), batch)
    assert kernel.made.cache_info().currsize == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_temporary_directory_is_no_missing_compiler(
    no_kernel, batch, monkeypatch, lively
):
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/nowhere")
        patch.delenv("CXX")
        with pytest.warns(RuntimeWarning, match="No such file or directory: '/nowhere/torchnnfs-"):
            fuse(lively(2, 5, 3))(batch)
        assert not kernel.broken
    monkeypatch.delenv("CXX")
    fused_model = fuse(lively(2, 6, 3))
    fused_model(batch)
    assert fused_model.formulation == "kernel"


def test_a_compiler_that_is_told_to_be_inexact_is_not(no_kernel, batch, monkeypatch, lively):
    monkeypatch.setenv("CXX", "c++ -ffast-math")
    model = lively(2, 5, 3)
    nan = torch.where(batch > 0, batch, torch.nan)
    assert fuse(model).formulation == "kernel"
    torch.testing.assert_close(fuse(model)(nan), model(nan), equal_nan=True)
    assert torch.tensor(1e-40) / 2 > 0  # nor does the process lose small numbers


def test_threads_compile_a_kernel_once(no_kernel, model, batch, monkeypatch, tmp_path):
    counted = 'echo >> "$0.calls"; exec c++ "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", counted))
    start = threading.Barrier(8)

    def call(_):
        start.wait()
        return fuse(model)(batch)

    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(call, range(8))
    assert all(torch.equal(first, other) for other in others)
    assert (tmp_path / "compiler.calls").read_text() == "\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:fuse:RuntimeWarning")
def test_then_torch_compile_computes_large_batches(no_kernel, lively):
    model, input = lively(2, 5, 3), torch.randn(9000, 2)
    fused_model = fuse(model)
    with torch.no_grad():
        got = fused_model(input)
        assert fused_model.formulation.startswith("torch.compile, since the C++ compiler failed")
        assert torch.equal(fused_model(input[:8001]), got[:8001])
    assert_agrees(model, input, candidates=["fused"])


def test_and_where_that_fails_eager_torch(no_kernel, model, monkeypatch, both):
    def fail(*arguments):
        raise RuntimeError("no compiler at all\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    input, fused_model = torch.randn(9000, 2), fuse(model)
    with pytest.warns(RuntimeWarning) as caught:
        got, expected = both(fused_model, input)
    assert torch.equal(got, expected)
    assert [str(each.message).partition(":")[0] for each in caught] == ["fuse", "fuse"]
    assert fused_model.formulation == fuse(model).formulation == "eager, since no compiler at all"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_and_export_see_one_operation(model, batch):
    fused_model = fuse(model)
    compiled = torch.compile(fused_model, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = fused_model(batch)
        assert torch.equal(compiled(batch), expected)
        assert torch.equal(compiled(batch[:9]), expected[:9])
        program = torch.export.export(fused_model, (batch,))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.torchnnfs.chain.default]
    assert torch.equal(program.module()(batch), expected)
    got = torch.autograd.grad(compiled(batch).log().mean(), list(model.parameters()))
    wanted = torch.autograd.grad(model(batch).log().mean(), list(model.parameters()))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("softmax", "biases"),
    [(True, [True, True]), (False, [False, True])],
    ids=str,
)
def test_the_operation_is_a_good_citizen_of_torch(softmax, biases):
    shapes = [(5, 2), (5,), (3, 5), (3,)]
    there = [True, biases[0], True, biases[1]]
    parameters = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape, is_there in zip(shapes, there, strict=True)
        if is_there
    ]

    def call(x, *parameters):
        return torch.ops.torchnnfs.chain(x, list(parameters), biases, [True, False], softmax)

    for x in (torch.randn(4, 2), torch.randn(2), torch.randn(2, 3, 2)):
        x = x.double().requires_grad_()
        arguments = (x, parameters, biases, [True, False], softmax)
        torch.library.opcheck(torch.ops.torchnnfs.chain.default, arguments)
        assert torch.autograd.gradcheck(call, (x, *parameters))
        assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_the_operation_under_vmap():
    shapes = [(5, 2), (5,), (3, 5)]
    one = [torch.randn(shape) for shape in shapes]
    many = [torch.randn(4, *shape) for shape in shapes]
    input = torch.randn(4, 6, 2)

    def call(x, parameters):
        return torch.ops.torchnnfs.chain(x, parameters, [True, False], [True, False], True)

    for dims, x, parameters in (
        ((0, None), input, one),
        ((None, 0), input[0], many),
        ((0, 0), input, many),
    ):
        got = torch.vmap(call, dims)(x, parameters)
        for i in range(4):
            own = [each[i] for each in parameters] if dims[1] == 0 else parameters
            torch.testing.assert_close(got[i], call(x[i] if dims[0] == 0 else x, own))
    got = torch.vmap(call, (1, None))(input, one)
    torch.testing.assert_close(got, call(input, one).movedim(1, 0))


def test_infinite_gradients_of_dead_neurons():
    weight = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    input = torch.ones(3, 2, requires_grad=True)
    output = torch.ops.torchnnfs.chain(input, [weight], [False], [True], False)
    output.backward(torch.full_like(output, float("inf")))
    assert torch.equal(weight.grad, torch.zeros(1, 2))
    assert torch.equal(input.grad, torch.zeros(3, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_no_memory_but_input_and_output():
    """At most 10 percent more, in a process of its own, whose peak no other test has seen."""
    script = """
import torch
from torchnnfs import classifier, fuse
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
with torch.no_grad():
    model = fuse(classifier(2, 64, 3))
    model(torch.ones(300_000, 2))
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what is used now
    before = peak()
    input = torch.randn(3_000_000, 2)
    output = model(input)
    print((peak() - before) / (input.nbytes + output.nbytes))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 0.8 < float(done.stdout) < 1.1


def test_the_operation_refuses_what_the_layers_refuse():
    """A kernel would read memory of another type or size, and give numbers."""
    x, w, b = torch.randn(4, 2), torch.randn(5, 2), torch.randn(5)
    wrong = [
        (x.double(), [w, b]),
        (x.half(), [w, b]),
        (x, [w.double(), b]),
        (torch.randn(4, 3), [w, b]),
        (x, [w, torch.randn(4)]),
        (x, [w, torch.randn(5, 1)]),
    ]
    freed = w.clone()
    freed.untyped_storage().resize_(0)
    for input, parameters in [*wrong, (x, [freed, b])]:
        with pytest.raises((RuntimeError, IndexError)):
            torch.ops.torchnnfs.chain(input, parameters, [True], [True], False)
    right = torch.ops.torchnnfs.chain(x, [w, b], [True], [True], False)
    torch.testing.assert_close(right, torch.relu(x @ w.T + b))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["another dtype", "another width"])
def test_a_compiled_chain_refuses_what_the_layers_refuse(model, batch, kind):
    compiled = torch.compile(fuse(model), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch), nn.Sequential.forward(model, batch))
        with pytest.raises(RuntimeError):
            compiled(batch.double() if kind == "another dtype" else torch.randn(300, 3))
