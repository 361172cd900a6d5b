"""What meets a device that is not the CPU; test_second_device.py runs this in its own process."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchnnfs import Dense, LazyDense, ReLU, Softmax, book, classifier, compare, fuse, spiral
from torchnnfs.__main__ import main
from torchnnfs.testing.candidates import Candidate, choose, devices_here

TWIN = torch.device("privateuseone", 0)  # which the process names "twin"


def network(device=TWIN):
    """The book's data, and the network that draws after it."""
    stream = np.random.RandomState(0)
    points, target = spiral(generator=stream, device=device)
    return classifier(2, 3, 3, generator=stream, device=device), points, target


def test_torch_and_this_package_know_of_it():
    assert torch.accelerator.current_accelerator(check_available=True).type == "twin"
    assert devices_here() == [torch.device("cpu"), TWIN]


def test_whatever_takes_a_device_makes_its_tensors_there():
    model, points, target = network()
    on_cpu, numbers, classes = network("cpu")
    assert {each.device for each in (*model.parameters(), points, target)} == {TWIN}
    assert torch.equal(points.cpu(), numbers)
    assert torch.equal(target.cpu(), classes)
    for here, there in zip(on_cpu.parameters(), model.parameters(), strict=True):
        assert torch.equal(here, there.cpu())
    lazy = LazyDense(3, device="twin", generator=np.random.RandomState(0))
    assert lazy(points).device == lazy.weight.device == TWIN
    with torch.device("twin"):
        assert Dense(2, 3).bias.device == TWIN
        assert spiral(5)[0].device == TWIN


def test_a_model_moves_there_and_back():
    model, points, _ = network("cpu")
    before = model(points)
    there = model.to("twin")(points.to("twin"))
    assert there.device == TWIN
    assert torch.equal(there.cpu(), before)
    assert torch.equal(model.cpu()(points), before)


@pytest.mark.parametrize(("home", "elsewhere"), [("twin:0", "cpu"), ("cpu", "twin:0")])
def test_an_input_on_another_device_is_an_error(home, elsewhere):
    message = (
        rf"Dense\(in_features=2\) holds its parameters on {home}, got an input on {elsewhere}; "
        rf"call input.to\('{home}'\) or layer.to\('{elsewhere}'\)"
    )
    with pytest.raises(ValueError, match=message):
        Dense(2, 3, device=home)(torch.ones(4, 2, device=elsewhere))


@pytest.mark.parametrize(
    ("owner", "draw"),
    [
        ("Dense", lambda generator: Dense(2, 3, device="twin", generator=generator)),
        ("Dense", lambda generator: classifier(2, 3, device="twin", generator=generator)),
        ("spiral", lambda generator: spiral(device="twin", generator=generator)),
    ],
)
def test_a_generator_of_another_device_is_an_error(owner, draw):
    message = rf"{owner} on twin:0 expects a torch.Generator on twin, got one on cpu"
    with pytest.raises(ValueError, match=message):
        draw(torch.Generator())


def test_without_a_generator_it_draws_there():
    layer, (points, _) = Dense(300, 400, device="twin"), spiral(50, 2, device="twin")
    assert layer.weight.device == points.device == TWIN
    assert abs(layer.weight.std().item() - 0.01) < 1e-4
    expected = torch.linspace(0, 1, 50).repeat(2)
    torch.testing.assert_close(points.norm(dim=1).cpu(), expected)


def test_the_dialect_computes_the_books_bits_there():
    results = []
    for device in ("cpu", "twin"):
        np.random.seed(0)
        layers = [book.Layer_Dense(2, 3, device=device), book.Activation_ReLU()]
        layers += [book.Layer_Dense(3, 3, device=device), book.Activation_Softmax()]
        x, _ = spiral(generator=np.random.RandomState(0), device=device)
        for layer in layers:
            x = layer.forward(x)
        assert x.device.type == device
        layers[-1].backward(np.eye(3, dtype=np.float32)[np.arange(300) % 3])
        layers[2].backward(layers[3].dinputs)
        results.append((layers[-1].output, layers[2].dweights, layers[2].dbiases))
    for here, there in zip(*results, strict=True):
        np.testing.assert_array_equal(here, there)


def test_weights_of_the_dialect_are_a_copy_there():
    layer = book.Layer_Dense(2, 3, device="twin")
    layer.weights[:] = 7
    assert not (layer.weight == 7).any()
    layer.weights += 1
    assert layer.weight.device == TWIN
    assert (layer.weight > 0.5).all()


def test_compare_judges_on_each_device():
    model, points, target = network("cpu")
    result = compare(model, points, candidates=["eager", "numpy"], backward=True, target=target)
    assert result.ok, result
    assert {row.device for row in result.rows} == {"cpu", "twin:0"}
    assert "device twin:0" in result.environment
    assert {each.device for each in model.parameters()} == {torch.device("cpu")}
    assert compare(model.to("twin"), points.to("twin"), candidates=["numpy"]).ok


def test_compare_finds_what_is_wrong_on_one_device():
    class Skewed(ReLU):
        def forward(self, input):
            output = super().forward(input)
            return output * (1 + 1e-5) if input.device.type == "twin" else output

    model, points, _ = network("cpu")
    model[1] = Skewed()
    result = compare(model, points, candidates=["eager"], controls=False)
    assert {row.device for row in result.rows if not row.ok} == {"twin:0"}
    assert compare(model, points, candidates=[Candidate("eager")], controls=False).ok


def test_candidates_of_the_cpu_are_asked_for_once():
    names = [(each.name, str(each.device)) for each in choose(["eager", "onnx", "numpy"])]
    assert names == [("eager", "cpu"), ("eager", "twin:0"), ("onnx", "cpu"), ("numpy", "cpu")]
    with pytest.raises(ValueError, match="onnx computes on the CPU here, got twin:0"):
        Candidate("onnx", TWIN)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [("auto", {"cpu", "twin:0"}), ("twin", {"twin:0"}), ("twin:0", {"twin:0"}), ("cpu", {"cpu"})],
)
def test_the_command_line_runs_where_it_is_asked_to(asked, shown, capsys):
    assert main(["compare", "--device", asked, "--candidates", "eager"]) == 0
    printed = capsys.readouterr().out
    assert {name for name in ("cpu", "twin:0") if f"device {name}:" in printed} == shown


def test_a_device_that_is_not_there(capsys):
    assert main(["compare", "--device", "twin:1"]) == 2
    assert "'twin:1' is not on this machine; here are cpu, twin:0" in capsys.readouterr().err


def test_fuse_says_that_it_is_not_on_the_cpu():
    model, points, target = network()
    fused = fuse(model)
    assert fused.formulation == "torch.compile, since it is not on the CPU"
    # torch.compile has no code for a device written in Python.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on its first import
        with pytest.warns(RuntimeWarning, match=r"torch.compile failed, .*'inductor' raised: \w+"):
            output = fused(points)
    assert torch.equal(output, model(points))
    assert fused.formulation.startswith("eager, since backend='inductor' raised: ")
    loss = fused.cross_entropy(points, target)
    torch.testing.assert_close(loss, F.cross_entropy(model[:3](points), target))
    with pytest.raises(ValueError, match="holds its parameters on twin:0, got an input on cpu"):
        fused(points.cpu())
    model.cpu()
    torch.testing.assert_close(fused(points.cpu()), output.cpu())
    assert fused.formulation == "kernel"


def test_training_runs_there():
    losses = {}
    for device in ("cpu", "twin"):
        model, points, target = network(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model[:3](points), target)
            loss.backward()
            optimizer.step()
        losses[device] = loss.item()
    assert losses["cpu"] == losses["twin"]


def test_layers_that_come_from_torch_stay_there():
    model = nn.Sequential(Dense(2, 3, device="twin"), ReLU(), Softmax())
    assert book.from_torch(model)[0].weight.device == TWIN
    assert book.to_torch(book.from_torch(model))[0].weight.device == TWIN
