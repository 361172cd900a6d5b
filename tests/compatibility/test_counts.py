"""Without numbers: layers that take no memory, and tools that count."""

import pytest
import torch
from torch import nn

from torchnnfs import Dense, classifier
from torchnnfs.classes import to_torch

#: What two Dense layers, 2 to 8 and 8 to 3, multiply for one row.
PRODUCTS = 2 * 8 + 8 * 3
PARAMETERS = 2 * 8 + 8 + 8 * 3 + 3


@pytest.mark.feature("FakeTensorMode", "`with FakeTensorMode(): Dense(2, 3)`")
def test_fake_tensors_have_shapes_alone(stream):
    from torch._subclasses import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        model = classifier(100_000, 100_000, 3)
        output = model(torch.ones(5, 100_000))
        output.sum().backward()
        drawn = Dense(2, 3, generator=stream).weight
    assert model[0].weight.grad.shape == (100_000, 100_000)
    assert output.shape == (5, 3)
    assert all(isinstance(each, FakeTensor) for each in (*model.parameters(), output, drawn))


@pytest.mark.feature(
    "accelerate, weights without memory",
    "`with init_empty_weights():`, `with init_on_device(torch.device(...)):`",
    packages=("accelerate",),
)
@pytest.mark.parametrize("context", ["init_empty_weights", "init_on_device"])
def test_accelerate_leaves_layers_on_the_meta_device(library, context):
    accelerate = library("accelerate")
    device = [torch.device("meta")] if context == "init_on_device" else []
    with getattr(accelerate, context)(*device):
        for layer in (Dense(20, 50), nn.Linear(20, 50)):
            assert [parameter.device.type for parameter in layer.parameters()] == ["meta", "meta"]
    assert not Dense(2, 3).weight.is_meta


@pytest.mark.feature("torch's FlopCounterMode", "`with FlopCounterMode() as counter: model(x)`")
def test_torchs_flop_counter(network, points):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network(2, 8, 3)(points)
    assert counter.get_total_flops() == 2 * len(points) * PRODUCTS
    layers = counter.get_flop_counts()
    assert sum(layers["Sequential.0"].values()) == 2 * len(points) * 2 * 8
    assert sum(layers["Sequential.2"].values()) == 2 * len(points) * 8 * 3


# It scripts its own functions when it is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.feature("fvcore", "`FlopCountAnalysis(model, x).total()`", packages=("fvcore",))
def test_fvcore_counts(library, network, points):
    fvcore = library("fvcore.nn")
    model = network(2, 8, 3)
    counted = fvcore.FlopCountAnalysis(model, points).unsupported_ops_warnings(False)
    assert counted.total() == len(points) * PRODUCTS
    assert counted.by_module()["2"] == len(points) * 8 * 3
    assert fvcore.parameter_count(model)[""] == PARAMETERS


# It compares versions with a class that Python deprecates.
@pytest.mark.filterwarnings("ignore:distutils Version classes:DeprecationWarning")
@pytest.mark.feature("thop", "`profile(to_torch(model), (x,))`", packages=("thop",))
def test_thop_counts_torchs_types(library, twins, points):
    thop = library("thop")
    ours, theirs = twins(2, 8, 3)
    counted = thop.profile(to_torch(ours), (points,), verbose=False)
    assert counted == thop.profile(theirs, (points,), verbose=False)
    # It adds to the products what a softmax over 3 classes does: 3 exp, 2 sums, 3 quotients.
    assert counted == (len(points) * (PRODUCTS + 3 + 2 + 3), PARAMETERS)
    assert not list(ours.buffers())  # it leaves its counts in the copy
    # When this fails, thop has changed and to_torch is not needed.
    assert thop.profile(ours, (points,), verbose=False) == (0, 0)


@pytest.mark.feature(
    "ptflops", "`get_model_complexity_info(to_torch(model), (2,))`", packages=("ptflops",)
)
def test_ptflops_counts_torchs_types(library, twins):
    ptflops = library("ptflops")

    def count(model):
        return ptflops.get_model_complexity_info(
            model, (2,), as_strings=False, print_per_layer_stat=False, backend="pytorch"
        )

    ours, theirs = twins(2, 8, 3)
    macs, parameters = count(to_torch(ours))
    assert (macs, parameters) == count(theirs)
    assert macs >= PRODUCTS
    assert parameters == PARAMETERS
    # When this fails, ptflops has changed and to_torch is not needed.
    assert count(ours)[0] < PRODUCTS
