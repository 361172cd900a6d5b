"""Compilers, exporters and transformations.

Each must give the bits of eager mode, or those that it gives for torch's classes. What does not
compute in eager mode's order is held to what rounding explains. What promises to leave the
module alone is held to that: the same attributes, parameters and bits afterwards.
"""

import copy
import importlib.util
import io
import logging

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune

from torchnnfs import Dense, ReLU, Softmax
from torchnnfs.classes import to_torch
from torchnnfs.testing.models import arguments_of, layer_of
from torchnnfs.testing.precision import PRECISIONS

# torch 2.13 deprecates its scripting, which its compiler and its forward derivatives still use.
SCRIPTING = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
# torch's exporters copy a type that torch itself deprecates.
LEAF_SPECS = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def state_of(model):
    """What a transformation that leaves a module alone leaves as it was."""
    return [
        (type(layer), sorted(vars(layer)), [(name, id(p)) for name, p in layer.named_parameters()])
        for layer in model.modules()
    ]


def gradients(model, input, of=None):
    input = input.detach().requires_grad_()
    weight = torch.linspace(-1, 1, 3, device=input.device)
    return torch.autograd.grad((model(input) * weight).sum(), [input, *(of or model).parameters()])


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)


def assert_within_rounding(output, model, input):
    """`output` differs from the exact result by no more than rounding in float32 explains."""
    exact = input.double().numpy()
    bound = np.zeros_like(exact)
    for layer in model:
        known, arguments = layer_of(layer), arguments_of(layer)
        bound = known.bound(exact, bound, PRECISIONS["float32"], **arguments)
        exact = known.forward(exact, **arguments)
    assert (np.abs(output.detach().double().numpy() - exact) <= bound).all()


@pytest.fixture
def compiler():
    """torch.compile as it is in a new process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# torch.compile


@pytest.mark.feature(
    "torch.compile, whole graph and any batch",
    "`torch.compile(model, fullgraph=True, dynamic=True)`",
)
@SCRIPTING
def test_compile(compiler, twins):
    batches, found = [torch.randn(rows, 2) for rows in (5, 2, 7, 300)], []
    for model in twins(2, 4, 3):
        before = state_of(model)[1:]  # the Sequential itself is marked as compiled
        compiled, got = torch.compile(model, fullgraph=True, dynamic=True), []
        for input, stance in zip(batches, ("default", *["fail_on_recompile"] * 3), strict=True):
            with torch.compiler.set_stance(stance):
                output = compiled(input)
            assert_within_rounding(output, model, input)
            got += [output, *torch.autograd.grad(output.log()[:, 0].sum(), [*model.parameters()])]
        found.append(got)
        assert state_of(model)[1:] == before
    assert_same_bits(*found)


@pytest.mark.feature("graphs that torch.compile sees", "`torch.compile(model, backend=...)`")
@SCRIPTING
def test_compile_sees_the_same_graph(compiler, twins, points):
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    ours, theirs = (torch.compile(model, backend=backend) for model in twins(2, 4, 3))
    assert torch.equal(ours(points), theirs(points))
    assert graphs[0] == graphs[1]
    assert len(graphs[0]) == 4


@pytest.mark.feature("mistakes under torch.compile", "`compiled(wrong)` raises")
@SCRIPTING
def test_compile_raises(compiler, network):
    compiled = torch.compile(network(2, 4, 3), backend="eager")
    with pytest.raises((RuntimeError, ValueError)):
        compiled(torch.randn(5, 4))


# Exporters


@pytest.mark.feature("torch.export, any batch", "`torch.export.export(model, (x,), ...)`")
@pytest.mark.parametrize("strict", [False, True])
@LEAF_SPECS
@SCRIPTING
def test_export(compiler, twins, points, strict):
    batch, graphs = torch.export.Dim("batch"), []
    for model in twins(2, 4, 3):
        before = state_of(model)
        program = torch.export.export(model, (points,), dynamic_shapes=({0: batch},), strict=strict)
        assert state_of(model) == before
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        graphs.append([str(node.target) for node in calls])
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for again in (program.module(), torch.export.load(file).module()):
            for rows in (2, 5, 9):
                input = torch.randn(rows, 2)
                assert torch.equal(again(input), model(input))
    assert graphs[0] == graphs[1]
    assert graphs[0] == [
        "aten.linear.default", "aten.relu.default", "aten.linear.default", "aten.softmax.int"
    ]  # fmt: skip


@pytest.mark.feature("AOTInductor", "`torch._inductor.aoti_compile_and_package(program)`")
@LEAF_SPECS
@SCRIPTING
def test_aotinductor(compiler, twins, points, tmp_path, pytestconfig):
    if pytestconfig.getoption("compatibility") is None:
        pytest.skip("takes 20 s: it runs where the table is checked, with --compatibility FILE")
    ours, _ = twins(2, 4, 3)  # one is slow enough; torch.export gives the same graph for both
    program = torch.export.export(ours, (points,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    before = state_of(ours)
    file = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/model.pt2")
    assert state_of(ours) == before
    package = torch._inductor.aoti_load_package(file)
    for rows in (5, 9):
        input = torch.randn(rows, 2)
        assert_within_rounding(package(input), ours, input)


@pytest.mark.feature(
    "ONNX: Gemm, Relu, Gemm, Softmax",
    "`torch.onnx.export(model, (x,), dynamo=True)`",
    packages=("onnx", "onnxscript", "onnxruntime"),
)
@needs("onnx", "onnxscript", "onnxruntime")
@LEAF_SPECS
@SCRIPTING
def test_onnx(twins, points, caplog):
    import onnxruntime

    caplog.set_level(logging.ERROR, "torch.onnx")  # it says which packages it could use as well
    sessions, shapes = [], ({0: torch.export.Dim("batch")},)
    for model in twins(2, 4, 3):
        program = torch.onnx.export(
            model.eval(), (points,), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        nodes = program.model_proto.graph.node
        assert [node.op_type for node in nodes] == ["Gemm", "Relu", "Gemm", "Softmax"]
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        sessions.append(session)
    for rows in (5, 9):
        input = torch.randn(rows, 2)
        name = session.get_inputs()[0].name
        outputs = [torch.from_numpy(s.run(None, {name: input.numpy()})[0]) for s in sessions]
        assert torch.equal(*outputs)
        assert_within_rounding(outputs[0], model, input)


@pytest.mark.feature("torch.jit.script", "`torch.jit.script(model)`")
@SCRIPTING
def test_script(twins, points, tmp_path):
    left = []
    for model in twins(2, 4, 3):
        scripted = torch.jit.script(model)
        left.append([sorted(vars(layer)) for layer in model.modules()])  # a Sequential is marked
        scripted.save(tmp_path / "model.pt")
        frozen = torch.jit.freeze(torch.jit.script(copy.deepcopy(model).eval()))
        for again in (scripted, torch.jit.load(tmp_path / "model.pt"), frozen):
            assert torch.equal(again(points), model(points))
        assert_same_bits(gradients(scripted, points), gradients(model, points))
    assert left[0] == left[1]


@pytest.mark.feature("torch.jit.trace", "`torch.jit.trace(model, x)`")
@SCRIPTING
def test_trace(network, points):
    model = network(2, 4, 3)
    before = state_of(model)
    traced = torch.jit.trace(model, points)
    assert state_of(model) == before
    input = torch.randn(9, 2)
    assert torch.equal(traced(input), model(input))


@pytest.mark.feature("FX tracing", "`torch.fx.symbolic_trace(model)`")
def test_fx(network, points):
    model = network(2, 4, 3)
    before = state_of(model)
    traced = fx.symbolic_trace(model)
    assert state_of(model) == before
    assert torch.equal(traced(points), model(points))
    assert_same_bits(gradients(traced, points), gradients(model, points))


@pytest.mark.feature(
    "FX, layers as leaves", "`symbolic_trace(to_torch(model))`, or a Tracer with `is_leaf_module`"
)
def test_fx_leaves(twins, points):
    """A leaf is by default what is defined in torch.nn: our layers are traced through."""
    ours, theirs = twins(2, 4, 3)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            kinds = (nn.Linear, nn.ReLU, nn.Softmax)
            return isinstance(module, kinds) or super().is_leaf_module(module, name)

    def operations(graph):
        return [node.op for node in graph.nodes if node.op.startswith("call")]

    assert operations(fx.symbolic_trace(ours).graph) == ["call_function"] * 4
    for graph in (
        fx.symbolic_trace(theirs).graph,
        fx.symbolic_trace(to_torch(ours)).graph,
        Tracer().trace(ours),
    ):
        assert operations(graph) == ["call_module"] * 4
    again = fx.GraphModule(ours, Tracer().trace(ours))
    assert type(again.get_submodule("0")) is Dense
    assert torch.equal(again(points), ours(points))


# torch.func


@pytest.mark.feature("functional_call", "`torch.func.functional_call(model, parameters, (x,))`")
def test_functional_call(network, points):
    model = network(2, 4, 3)
    other = {name: 2 * p.detach() for name, p in model.named_parameters()}
    before, expected = state_of(model), copy.deepcopy(model)
    expected.load_state_dict(other)
    assert torch.equal(functional_call(model, other, (points,)), expected(points))
    assert state_of(model) == before
    assert not torch.equal(model(points), expected(points))


@pytest.mark.feature("ensembles by vmap", "`stack_module_state(models)`, `vmap(call)`")
def test_vmap_over_an_ensemble(twins, points):
    found = []
    for model in twins(2, 4, 3):
        models = [copy.deepcopy(model) for _ in range(3)]
        with torch.no_grad():
            for factor, each in enumerate(models, 1):
                each[0].weight.mul_(factor)
        parameters, buffers = stack_module_state(models)
        before = state_of(model)

        def call(parameters, buffers, model=model):
            return functional_call(model, (parameters, buffers), (points,))

        outputs = vmap(call)(parameters, buffers)
        assert state_of(model) == before
        for output, each in zip(outputs, models, strict=True):
            assert_within_rounding(output, each, points)
        found.append(outputs)
    assert torch.equal(*found)


@pytest.mark.feature("gradients per sample", "`vmap(grad(loss), in_dims=(None, 0))`")
def test_gradients_per_sample(twins, points):
    found = []
    for model in twins(2, 4, 3):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, x, model=model):
            return -functional_call(model, parameters, (x,))[0].log()

        each = vmap(grad(loss), in_dims=(None, 0))(parameters, points)
        assert each["0.weight"].shape == (5, 4, 2)
        found.append(each.values())
    assert_same_bits(*found)


@pytest.mark.feature("Jacobians and Hessians", "`torch.func.jacrev(model)`, `hessian`, `jacfwd`")
@SCRIPTING
@pytest.mark.parametrize(
    "transform",
    [jacrev, torch.func.jacfwd, lambda model: hessian(lambda x: model(x)[0].log())],
    ids=["jacrev", "jacfwd", "hessian"],
)
def test_jacobians(twins, points, transform):
    found = []
    for model in twins(2, 4, 3):
        before = state_of(model)
        found.append(transform(model)(points[0]))
        assert state_of(model) == before
    assert torch.equal(*found)
    assert found[0].any()


# Precision


@pytest.mark.feature("autocast to bfloat16", '`with torch.autocast("cpu", torch.bfloat16):`')
def test_autocast(twins, points):
    found = []
    for model in twins(2, 4, 3):
        with torch.autocast("cpu", torch.bfloat16):
            hidden, output = model[0](points), model(points)
            found.append([hidden, output, *gradients(model, points)])
        assert hidden.dtype == torch.bfloat16
        assert model[0].weight.dtype == torch.float32
    assert_same_bits(*found)


@pytest.mark.feature("autocast to float16 on a GPU", '`with torch.autocast("cuda"):`')
@CUDA
def test_autocast_on_a_gpu(twins, points):
    found, points = [], points.cuda()
    for model in twins(2, 4, 3):
        model.cuda()
        with torch.autocast("cuda", torch.float16):
            hidden, output = model[0](points), model(points)
            found.append([hidden, output, *gradients(model, points)])
        assert hidden.dtype == torch.float16
    assert_same_bits(*found)


@pytest.mark.feature("CUDA graphs", "`torch.cuda.make_graphed_callables(model, (x,))`")
@CUDA
def test_cuda_graphs(twins, points):
    outputs = []
    for model in twins(2, 4, 3):
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model).cuda(), (points.cuda(),))
        outputs.append(graphed(points.cuda()).clone())
    assert torch.equal(*outputs)


# torch.ao prints its deprecation, and a later one of a type that it makes.
@pytest.mark.feature("quantize_dynamic", "`quantize_dynamic(to_torch(model), {nn.Linear})`")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantize_dynamic(twins, points):
    """It asks for the exact type, and passes over a subclass without a word."""
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import quantize_dynamic

    if "qnnpack" not in torch.backends.quantized.supported_engines and (
        "fbgemm" not in torch.backends.quantized.supported_engines
    ):
        pytest.skip("this torch has no engine for quantized layers")
    ours, theirs = twins(2, 4, 3)
    passed_over = quantize_dynamic(ours, {nn.Linear})
    assert [type(layer) for layer in passed_over] == [Dense, ReLU, Dense, Softmax]
    before = state_of(ours)
    quantized = [quantize_dynamic(model, {nn.Linear}) for model in (to_torch(ours), theirs)]
    assert state_of(ours) == before
    for model in quantized:
        assert [type(layer) for layer in model[::2]] == [Linear, Linear]
    assert torch.equal(quantized[0](points), quantized[1](points))
    assert not torch.equal(quantized[0](points), ours(points))


# What hooks into a module


@pytest.mark.feature("forward hooks", "`layer.register_forward_hook(hook)`, `..._pre_hook`")
def test_forward_hooks(network, points):
    model = network(2, 4, 3)
    before, expected, seen = state_of(model), model(points), []
    handles = [
        model[0].register_forward_pre_hook(lambda layer, args: (2 * args[0],)),
        model[0].register_forward_hook(lambda layer, args, output: seen.append(args[0])),
        model[3].register_forward_hook(lambda layer, args, output: 1 - output),
        model[1].register_forward_pre_hook(
            lambda layer, args, keywords: seen.append(len(args)), with_kwargs=True
        ),
    ]
    hooked = model(points)
    assert torch.equal(seen[0], 2 * points)
    assert seen[1] == 1
    for handle in handles:
        handle.remove()
    assert torch.equal(hooked, 1 - model(2 * points))
    assert torch.equal(model(points), expected)
    assert state_of(model) == before
    always = model[0].register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.ones(5, 4))
    always.remove()
    assert seen[-1] == "always"


@pytest.mark.feature("backward hooks", "`layer.register_full_backward_hook(hook)`")
def test_backward_hooks(twins, points):
    found = []
    for model in twins(2, 4, 3):
        before, seen = state_of(model), []

        def note(layer, *gradients, seen=seen):
            seen.extend(each for group in gradients for each in group)

        handles = [layer.register_full_backward_hook(note) for layer in model]
        handles += [layer.register_full_backward_pre_hook(note) for layer in model]
        handles.append(model[0].weight.register_hook(lambda gradient: 2 * gradient))
        gradients_found = gradients(model, points)
        for handle in handles:
            handle.remove()
        assert len(seen) == 4 * 3
        found.append([*seen, *gradients_found])
        assert state_of(model) == before
    assert_same_bits(*found)


@pytest.mark.feature("hooks for all modules", "`register_module_forward_hook(hook)`")
def test_global_hooks(network, points):
    model, seen = network(2, 4, 3), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda layer, args, output: seen.append(type(layer))
    )
    try:
        model(points)
    finally:
        handle.remove()
    assert seen == [type(layer) for layer in [*model, model]]


@pytest.mark.feature("activation checkpointing", "`checkpoint_sequential(model, 2, x)`")
def test_activation_checkpointing(network, points):
    from torch.utils.checkpoint import checkpoint_sequential

    model = network(2, 4, 3)

    def saving(input):
        return checkpoint_sequential(model, 2, input, use_reentrant=False)

    assert_same_bits(gradients(saving, points, model), gradients(model, points))


# What changes parameters


@pytest.mark.feature(
    "parametrizations", "`parametrizations.weight_norm(layer)`, `orthogonal`, `spectral_norm`"
)
@pytest.mark.parametrize("name", ["weight_norm", "orthogonal", "spectral_norm"])
def test_parametrizations(twins, points, name):
    found = []
    for model in twins(2, 4, 3):
        layer = model[0]
        kind, attributes, weight = type(layer), sorted(vars(layer)), layer.weight.detach().clone()
        torch.manual_seed(0)
        getattr(parametrizations, name)(layer)
        assert parametrize.is_parametrized(layer, "weight")
        assert isinstance(layer, kind)
        output = model(points)
        found.append([output, *gradients(model, points), *model.state_dict().values()])
        parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is kind
        assert sorted(vars(layer)) == attributes
        assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
        assert (name == "weight_norm") == torch.allclose(layer.weight, weight)
        found[-1].append(model(points))
    assert_same_bits(*found)


@pytest.mark.feature("pruning", '`prune.l1_unstructured(layer, "weight", amount=0.5)`')
@pytest.mark.parametrize("structured", [False, True])
def test_pruning(twins, points, structured):
    found = []
    for model in twins(2, 4, 3):
        layer, before = model[0], sorted(vars(model[0]))
        if structured:
            prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
        else:
            prune.l1_unstructured(layer, "weight", amount=0.5)
        assert (layer.weight == 0).sum() == 4
        found.append([model(points), *gradients(model, points), *layer.state_dict().values()])
        prune.remove(layer, "weight")
        assert not prune.is_pruned(model)
        assert sorted(vars(layer)) == before
        assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
        found[-1].append(model(points))
    assert_same_bits(*found)


@pytest.mark.feature("parameters as one vector", "`parameters_to_vector(model.parameters())`")
def test_vectors(network, points):
    model = network(2, 4, 3)
    before, expected = state_of(model), model(points)
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert vector.shape == (2 * 4 + 4 + 4 * 3 + 3,)
    nn.utils.vector_to_parameters(torch.zeros_like(vector), model.parameters())
    assert not model(points).sub(1 / 3).abs().gt(1e-7).any()
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert torch.equal(model(points), expected)
    assert state_of(model) == before


@pytest.mark.feature("clipping", "`clip_grad_norm_(model.parameters(), 1)`, `clip_grad_value_`")
def test_clipping(twins, points):
    found = []
    for model in twins(2, 4, 3):
        (-model(points).log()).sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5
        found.append([norm, *(parameter.grad.clone() for parameter in model.parameters())])
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        assert max(parameter.grad.abs().max() for parameter in model.parameters()) <= 0.01
    assert_same_bits(*found)


@pytest.mark.feature("layers without initialisation", "`nn.utils.skip_init(Dense, 2, 3)`")
def test_skip_init():
    state = torch.random.get_rng_state()
    layer = nn.utils.skip_init(Dense, 2, 3, dtype=torch.float64)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(layer) is Dense
    assert (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float64)


@pytest.mark.feature("folding in batch norm", "`nn.utils.fusion.fuse_linear_bn_eval(layer, norm)`")
def test_fusion(twins, points):
    norm = nn.BatchNorm1d(4).eval()
    with torch.no_grad():
        norm.running_mean.fill_(0.5)
    fused = [nn.utils.fusion.fuse_linear_bn_eval(model[0].eval(), norm) for model in twins(2, 4, 3)]
    assert type(fused[0]) is Dense
    assert torch.equal(fused[0](points), fused[1](points))
