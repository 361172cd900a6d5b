"""Other people's libraries."""

import copy
import warnings

import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, spiral
from torchnnfs.classes import to_torch
from torchnnfs.testing.precision import PRECISIONS


@pytest.mark.feature(
    "safetensors",
    "`save_file(model.state_dict(), file)`, `load_file(file)`",
    packages=("safetensors",),
)
def test_safetensors_saves_and_loads(library, network, points, tmp_path):
    safe = library("safetensors.torch")
    model, again = network(2, 8, 3), network(2, 8, 3)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    safe.save_file(model.state_dict(), tmp_path / "model.safetensors")
    again.load_state_dict(safe.load_file(tmp_path / "model.safetensors"))
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    assert torch.equal(again(points), model(points))


@pytest.mark.feature(
    "safetensors, tied parameters",
    "`save_model(model, file)`, `load_model(model, file)`",
    packages=("safetensors",),
)
def test_safetensors_keeps_parameters_tied(library, tmp_path):
    safe = library("safetensors.torch")

    def tied():
        model = nn.Sequential(Dense(4, 4), ReLU(), Dense(4, 4))
        model[2].weight = model[0].weight
        return model

    model, again = tied(), tied()
    assert not torch.equal(model[0].weight, again[0].weight)
    safe.save_model(model, str(tmp_path / "model.safetensors"))
    assert sorted(safe.load_file(tmp_path / "model.safetensors")) == [
        "0.bias", "0.weight", "2.bias",
    ]  # fmt: skip
    assert safe.load_model(again, str(tmp_path / "model.safetensors")) == (set(), [])
    assert again[2].weight is again[0].weight
    assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.feature("torchao", "`quantize_(model, Int8WeightOnlyConfig())`", packages=("torchao",))
def test_torchao_quantizes_weights_to_int8(library, network, twins):
    quantization = library("torchao.quantization")
    generator = torch.Generator().manual_seed(2)
    model = network(64, 32, 3)
    quantized = copy.deepcopy(model)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    assert quantized[0].weight.qdata.dtype == quantized[2].weight.qdata.dtype == torch.int8
    input = torch.randn(5, 64, generator=generator)
    for index in (0, 2):
        before = model[index]
        weight = before.weight.detach()
        # 256 steps cover a neuron's weights from -max to max, and each goes to the nearest step
        # (the largest to 127, half a step away), so a weight moves by half a step at most.
        half = weight.abs().amax(1) / 127.5 / 2
        moved = input.abs().sum(1, keepdim=True) * half
        # Rounding: of the sum on both sides, and of the step and of weight over step once each.
        terms = input.abs() @ (weight.abs() + half[:, None]).T + before.bias.abs()
        rounding = 2 * PRECISIONS["float32"].gamma(weight.shape[1] + 4) * terms
        with torch.no_grad():
            gap = (quantized[index](input) - before(input)).abs()
            assert (gap <= moved + rounding).all()
            assert (gap > rounding).any()  # it is not the float weight that is still in use
            input = model[index + 1](before(input))
    theirs = twins(64, 32, 3)[1]
    quantization.quantize_(theirs, quantization.Int8WeightOnlyConfig())
    input = torch.randn(5, 64, generator=generator)
    assert torch.equal(quantized(input), theirs(input))


@pytest.mark.feature(
    "PEFT", '`get_peft_model(model, LoraConfig(target_modules=["0"]))`', packages=("peft",)
)
def test_peft_adapts_a_layer_by_name(library, network):
    peft = library("peft")
    generator = torch.Generator().manual_seed(2)

    def quarters(*shape):
        return torch.randint(-4, 5, shape, generator=generator) / 4

    model = network(2, 8, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(quarters(*parameter.shape))
    before = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert [name.split(".")[-4:-1] for name in trained] == [
        ["0", "lora_A", "default"],
        ["0", "lora_B", "default"],
    ]

    input, old = quarters(5, 2), {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.5)
    (-adapted(input)[:, 0].log().mean()).backward()
    optimizer.step()
    assert isinstance(adapted.base_model.model[0], peft.tuners.lora.layer.Linear)
    assert isinstance(adapted.base_model.model[0].base_layer, Dense)
    assert torch.equal(adapted.base_model.model[0].base_layer.weight, before["0.weight"])
    assert all(torch.equal(model.get_parameter(k), before[k]) for k in ("2.weight", "2.bias"))
    assert not any(torch.equal(p, old[name]) for name, p in trained.items())

    # Multiples of 1/4 have exact products and sums, so merging changes no bit.
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(quarters(*parameter.shape))
    expected = adapted(input)
    merged = adapted.merge_and_unload()
    assert type(merged[0]) is Dense
    assert not torch.equal(merged[0].weight, before["0.weight"])
    assert torch.equal(merged(input), expected)


def without_biases(model):
    for layer in model[::2][:2]:
        nn.init.zeros_(layer.bias)
    return model


@pytest.mark.feature(
    "Captum, integrated gradients", "`IntegratedGradients(model)`", packages=("captum",)
)
def test_captums_integrated_gradients_are_complete(library, network, twins, points):
    attr = library("captum.attr")
    model = without_biases(network(2, 8, 3, dtype=torch.float64))
    points = points.double()
    found = attr.IntegratedGradients(model).attribute(points, torch.zeros_like(points), target=1)
    expected = (model(points) - model(torch.zeros_like(points)))[:, 1].detach()
    # Without biases no ReLU switches between 0 and a point, so what is integrated is analytic, and
    # the error of 50 nodes (Gauss-Legendre) is far below rounding. Captum rounds the weights of
    # the nodes to float32, and they sum to 1; all else is fewer than 100 roundings in a row. Both
    # are relative to the sums without signs; a softmax moves by less than its logits.
    first, second = (layer.weight.detach().abs() for layer in model[:3:2])
    size = (points.abs() @ first.T @ second.T).sum(1)
    bound = (2.0**-24 + 2 * PRECISIONS["float64"].gamma(100)) * (1 + size)
    assert ((found.sum(1) - expected).abs() <= bound).all()
    assert (expected.abs() > 1000 * bound).all()
    theirs = attr.IntegratedGradients(without_biases(twins(2, 8, 3, dtype=torch.float64)[1]))
    assert torch.equal(found, theirs.attribute(points, torch.zeros_like(points), target=1))


def deep_lift(attr, model, points):
    lift = attr.DeepLift(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What Captum says of every model: it sets hooks, and turns gradients on.
        warnings.filterwarnings("ignore", "Setting forward, backward hooks")
        warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")
        found = lift.attribute(points, torch.zeros_like(points), target=1).detach()
    missing = found.sum(1) - (model(points) - model(torch.zeros_like(points)))[:, 1].detach()
    return found, missing.abs()


@pytest.mark.feature("Captum, DeepLift", "`DeepLift(to_torch(model))`", packages=("captum",))
def test_captums_deep_lift_is_complete_on_torchs_own_types(library, network, twins, points):
    attr = library("captum.attr")
    # Of the logits: Captum's rule for a softmax is not complete, with torch's own classes either.
    model = network(2, 8, 3, dtype=torch.float64)[:-1]
    points = points.double()
    found, missing = deep_lift(attr, to_torch(model), points)
    # Fewer than 100 roundings in a row; but a rule divides by how far a neuron has moved, which
    # makes the rounding of its two values larger by their size over that.
    weights = [layer.weight.detach().abs() for layer in model[::2]]
    bias = model[0].bias.detach().abs()
    moved = (points @ model[0].weight.detach().T).abs()
    grown = ((points.abs() @ weights[0].T + 2 * bias) / moved).amax(1)
    size = (points.abs() @ weights[0].T + bias) @ weights[1].T + model[2].bias.detach().abs()
    bound = 2 * PRECISIONS["float64"].gamma(100) * (1 + grown) * size.sum(1)
    assert (missing <= bound).all()
    theirs = twins(2, 8, 3, dtype=torch.float64)[1][:-1]
    assert torch.equal(found, deep_lift(attr, theirs, points)[0])


@pytest.mark.feature("Captum, DeepLift", "`DeepLift(to_torch(model))`", packages=("captum",))
def test_captums_deep_lift_passes_over_our_types(library, twins, points):
    attr = library("captum.attr")
    # Captum looks a layer's exact type up, so it finds no rule for our ReLU and says nothing: what
    # comes out are gradients. When this fails, Captum has changed and to_torch is not needed.
    model = twins(2, 8, 3, dtype=torch.float64)[0][:-1]
    points = points.double().requires_grad_()
    found, missing = deep_lift(attr, model, points)
    (gradient,) = torch.autograd.grad(model(points)[:, 1].sum(), points)
    assert torch.equal(found, gradient * points)
    assert missing.max() > 0.1


@pytest.mark.feature("torchinfo", "`summary(model, (5, 2))`", packages=("torchinfo",))
def test_torchinfo_counts(library, network, capsys):
    torchinfo = library("torchinfo")
    summary = torchinfo.summary(network(2, 8, 3), (5, 2), verbose=0)
    rows = [(row.class_name, row.output_size, row.num_params) for row in summary.summary_list[1:]]
    names = ["Dense", "ReLU", "Dense", "Softmax"]
    sizes = [[5, 8], [5, 8], [5, 3], [5, 3]]
    assert rows == list(zip(names, sizes, [24, 0, 27, 0], strict=True))
    assert summary.total_params == summary.trainable_params == 51
    # A linear layer counts its 24 and 27 parameters once for each of 5 rows, the others nothing.
    assert summary.total_mult_adds == 5 * (24 + 27)
    assert "Dense: 1-1" in str(summary)


def step_by_step(model, input, target):
    """What the trainer below does, without it: four batches of 75, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for rows in torch.arange(len(input)).split(75):
        optimizer.zero_grad()
        (-model(input[rows])[range(75), target[rows]].log().mean()).backward()
        optimizer.step()
    return list(model.parameters())


# Its copy of a type that torch deprecates, and its advice on worker processes.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.feature("lightning", "`Trainer().fit(module, loader)`", packages=("lightning",))
def test_lightning_trains(library, network):
    lightning = library("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network(2, 8, 3)

        def training_step(self, batch, index):
            input, target = batch
            return -self.model(input)[range(len(input)), target].log().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    data, module = spiral(), Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=75)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    lightning.Trainer(accelerator="cpu", max_epochs=1, **dict.fromkeys(quiet, False)).fit(
        module, loader
    )
    assert all(map(torch.equal, module.parameters(), step_by_step(network(2, 8, 3), *data)))
    assert not torch.equal(module.model[0].weight, network(2, 8, 3)[0].weight)


@pytest.mark.feature("skorch", "`NeuralNetClassifier(model).fit(x, y)`", packages=("skorch",))
def test_skorch_trains(library, network, twins):
    skorch = library("skorch")
    input, target = (part.numpy() for part in spiral())
    settings = {"max_epochs": 1, "lr": 0.5, "batch_size": 75, "train_split": None, "verbose": 0}
    found = []
    for model in twins(2, 8, 3):
        net = skorch.NeuralNetClassifier(model, criterion=nn.NLLLoss, **settings)
        found.append(torch.from_numpy(net.fit(input, target).predict_proba(input)))
    assert torch.equal(*found)
    assert not torch.equal(found[0], network(2, 8, 3)(torch.from_numpy(input)))


@pytest.mark.feature(
    "torchmetrics", "`MulticlassAccuracy(3)(model(x), target)`", packages=("torchmetrics",)
)
def test_torchmetrics_takes_probabilities(library, network):
    metrics = library("torchmetrics.classification")
    input, target = spiral()
    output = network(2, 8, 3)(input)
    accuracy = metrics.MulticlassAccuracy(3, average="micro")(output, target)
    assert accuracy == (output.argmax(-1) == target).float().mean()
    assert 0 < accuracy < 1


# It traces the model.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.feature(
    "tensorboard", "`SummaryWriter().add_graph(model, x)`", packages=("tensorboard",)
)
def test_tensorboard_shows_the_graph(library, network, points, tmp_path):
    reader = library("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    model = network(2, 8, 3)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(model, points)
        writer.add_histogram("weight", model[0].weight)
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    graph = str(events.Graph())
    names = ("Dense[0]", "ReLU[1]", "Dense[2]", "Softmax[3]")
    assert all(f"Sequential/{name}" in graph for name in names)
    (histogram,) = events.Histograms("weight")
    assert histogram.histogram_value.num == 2 * 8
