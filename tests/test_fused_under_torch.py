"""fuse under torch's transformations and modes: what the layers give, whoever computes."""

import pytest
import torch
from torch import nn

from torchnnfs import Softmax, fuse

TRANSFORMATIONS = {
    "vmap": lambda f, x: torch.vmap(f)(x.reshape(10, 30, 2)),
    "vmap around a constant": lambda f, x: torch.vmap(lambda scale: f(x) * scale)(torch.ones(2)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0]),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "functional_call": lambda f, x: torch.func.functional_call(
        f, {name: 2 * p for name, p in f.named_parameters()}, x
    ),
    "grad of parameters": lambda f, x: torch.func.grad(
        lambda p: torch.func.functional_call(f, p, x)[:, 0].log().mean()
    )(dict(f.named_parameters()))["0.weight"],
    "forward mode": lambda f, x: forward_mode(f, x),
    "autocast": lambda f, x: torch.autocast("cpu", torch.bfloat16)(f)(x),
    "inference mode": lambda f, x: torch.inference_mode()(f)(x).clone(),
    "make_fx": lambda f, x: torch.fx.experimental.proxy_tensor.make_fx(f)(x)(2 * x),
    "default device": lambda f, x: on_meta(f, x),
    "function mode": lambda f, x: doubled(f, x),
    "batched gradients": lambda f, x: torch.autograd.functional.jacobian(
        lambda x: f(x).sum(0), x, vectorize=True
    ),
    "negative bit": lambda f, x: f(torch._neg_view(x)),
}


def forward_mode(model, x):
    from torch.autograd import forward_ad

    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(model(dual)).tangent.clone()


def doubled(model, x):
    from torch.overrides import TorchFunctionMode

    class Doubled(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return 2 * result if function is nn.functional.linear else result

    with Doubled(), torch.no_grad():
        return model(x)


def on_meta(model, x):
    with torch.device("meta"), torch.no_grad():
        return model(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(model, batch, name):
    got = TRANSFORMATIONS[name](fuse(model), batch)
    expected = TRANSFORMATIONS[name](model, batch)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_follows_its_input(model, batch):
    with torch.no_grad():
        traced = torch.jit.trace(fuse(model), batch)
    torch.testing.assert_close(traced(batch[:7]), model(batch[:7]))


COMPILED = {
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "grad": lambda f: torch.func.grad(lambda x: f(x)[:, 0].log().mean()),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda x: f(x)[0].log())),
    "forward mode": lambda f: lambda x: forward_mode(f, x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_transformations(model, batch, name):
    torch._dynamo.reset()
    got = torch.compile(COMPILED[name](fuse(model)), backend="eager")(batch)
    torch.testing.assert_close(got, COMPILED[name](model)(batch))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's own
def test_compiled_hooks_for_all_modules_and_layers_that_were_replaced(model, batch):
    fused_model, hooks = fuse(model), nn.modules.module
    torch._dynamo.reset()
    handle = hooks.register_module_forward_hook(
        lambda module, _, output: 2 * output if isinstance(module, nn.ReLU) else None
    )
    try:
        got, expected = torch.compile(fused_model, backend="eager")(batch), model(batch)
    finally:
        handle.remove()
    torch.testing.assert_close(got, expected)
    model[0] = nn.Linear(2, 3)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"call fuse\(model\) again"):
        torch.compile(fused_model, backend="eager")(batch)


def test_fake_tensors_stay_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        output = fuse(nn.Sequential(nn.Linear(2, 3), Softmax()))(torch.empty(300, 2))
    assert (type(output).__name__, output.shape) == ("FakeTensor", (300, 3))
