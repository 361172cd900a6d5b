"""Scaling out: several processes, sharded parameters, checkpoints.

Two processes on the CPU (gloo, loopback alone) run this file as a script, do every check, and write
down what they got; the tests compare it with one process.
"""

import datetime
import os
import re
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn  # before a process group is made, for the reason in docs/scale-out.md
from torch import nn

from torchnnfs import Dense, classifier, spiral
from torchnnfs.testing.precision import PRECISIONS

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch is built without gloo, the backend for the CPU",
)

DOC = Path(__file__).parents[2] / "docs" / "scale-out.md"
WORLD = 2
ROWS = 8
RATE = 1 / 8


def quarters():
    """Linear, ReLU, Linear, Softmax with multiples of 1/4 as parameters.

    With `batch`, every product and sum up to the logits is exact: whatever the order in which an
    engine adds, logits and probabilities have the same bits.
    """
    generator = torch.Generator().manual_seed(0)
    model = classifier(2, 8, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator) / 4)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    input = torch.randint(-4, 5, (ROWS, 2), generator=generator) / 4
    return input, torch.eye(3)[torch.randint(3, (ROWS,), generator=generator)]


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def step(model, input, target):
    """One step of training. All in it but the sums over rows and neurons is exact or one row's.

    The mean is over 8 rows or 4, and the rate 1/8: powers of two, which scale without rounding.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    output = model(input)
    (-(target * output.log()).sum(-1)).mean().backward()
    optimizer.step()
    return {
        "output": whole(output),
        "gradients": [whole(parameter.grad) for parameter in model.parameters()],
        "parameters": [whole(parameter) for parameter in model.parameters()],
    }


# What the two processes do ------------------------------------------------------------------------


def share(rank):
    return slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp(mesh, folder):
    model = nn.parallel.DistributedDataParallel(quarters())
    return step(model, *(part[share(dist.get_rank())] for part in batch()))


def fsdp(mesh, folder):
    model = shard(quarters(), mesh)
    assert isinstance(model[0], Dense)
    assert model[0].weight.to_local().shape == (4, 2)
    return step(model, *(part[share(dist.get_rank())] for part in batch()))


def fsdp_from_meta(mesh, folder):
    with torch.device("meta"):
        model = classifier(2, 8, 3)
    shard(model, mesh).to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    for layer in model[::2][:2]:
        layer.reset_parameters()
    return {"parameters": [whole(parameter) for parameter in model.parameters()]}


def tensor_parallel(mesh, folder):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = quarters()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert [model[0].weight.to_local().shape, model[2].weight.to_local().shape] == [(4, 2), (3, 4)]
    return step(model, *batch())


def dtensor(mesh, folder):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    def by_rows(name, module, mesh):
        for key, parameter in list(module.named_parameters(recurse=False)):
            parts = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(parts))

    model = distribute_module(quarters(), mesh, by_rows)
    return step(model, *(distribute_tensor(part, mesh, [Shard(0)]) for part in batch()))


def checkpoint(mesh, folder):
    import torch.distributed.checkpoint as dcp

    model = shard(quarters(), mesh)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "checkpoint")
    return {}


def fsdp_of_the_book(mesh, folder):
    model = shard(classifier(2, 8, 3, generator=np.random.RandomState(0)), mesh)
    return {"parameters": [whole(parameter) for parameter in model.parameters()]}


def fsdp_of_the_book_from_meta(mesh, folder):
    model = shard(classifier(2, 8, 3, device="meta"), mesh).to_empty(device="cpu")
    stream = np.random.RandomState(0)
    for layer in model[::2]:
        layer.reset_parameters(stream)
    return {"parameters": [whole(parameter) for parameter in model.parameters()]}


CHECKS = (ddp, fsdp, fsdp_from_meta, tensor_parallel, dtensor, checkpoint)
CHECKS += (fsdp_of_the_book, fsdp_of_the_book_from_meta)


def work(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=30),
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    got = {}
    for check in CHECKS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # torch says so of every CPU mesh: its generators are not kept in step.
                warnings.filterwarnings("ignore", "DTensor random operators may not have")
                found = check(mesh, folder)
        except Exception:
            found = {"error": traceback.format_exc()}
            print(f"{check.__name__}: {found['error']}", file=sys.stderr)
        got[check.__name__] = found
    torch.save(got, folder / f"{rank}.pt")
    dist.destroy_process_group()


# What is expected of them -------------------------------------------------------------------------


def alone():
    """The environment of a child that talks through the loopback interface alone."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    own = {"GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in foreign} | own


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    children = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                command = [sys.executable, __file__, str(rank), str(folder)]
                children.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=alone(), cwd=folder)
                )
        limit = time.monotonic() + 150
        while any(child.poll() is None for child in children):
            # When one has failed, the other waits for it in vain.
            if any(child.poll() for child in children) or time.monotonic() > limit:
                break
            time.sleep(0.05)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    if codes != [0] * WORLD:
        said = "\n".join(log.read_text() for log in logs)
        pytest.fail(f"exit codes {codes} (None: was still running)\n{said}", pytrace=False)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture
def processes(results):
    """`processes(check)`: what each of the two processes got."""

    def found(check):
        got = [result[check.__name__] for result in results[1]]
        for rank, answer in enumerate(got):
            if "error" in answer:
                pytest.fail(f"process {rank}: {answer['error']}", pytrace=False)
        return got

    return found


def gradient_bounds(model, input, target):
    """How far two computed gradients of `step` may be apart when they add in different orders.

    The gradient at the logits is one row's and has the same bits. From there on, a number is a sum
    over 3 logits at most, then one over 8 rows: 11 roundings, so each is within gamma(11) of the
    exact one, relative to the same sums without signs (Higham, section 3.1).
    """
    hidden = model[:2](input).detach()
    logits = model[2](hidden).detach().requires_grad_()
    (-(target * model[3](logits).log()).sum(-1)).mean().backward()
    second = logits.grad.abs()
    first = second @ model[2].weight.detach().abs() * (hidden > 0)
    sums = [first.T @ input.abs(), first.sum(0), second.T @ hidden, second.sum(0)]
    return [2 * PRECISIONS["float32"].gamma(11) * size for size in sums]


def assert_is_the_single_step(got, rows):
    input, target = batch()
    before = [parameter.detach().clone() for parameter in quarters().parameters()]
    bounds = gradient_bounds(quarters(), input, target)
    single = step(quarters(), input, target)
    half = step(quarters(), *(part[share(0)] for part in batch()))
    for rank, found in enumerate(got):
        assert torch.equal(found["output"], single["output"][rows(rank)])
        for index, bound in enumerate(bounds):
            gradient, expected = found["gradients"][index], single["gradients"][index]
            assert gradient.shape == expected.shape
            assert ((gradient - expected).abs() <= bound).all()
            # The bound can tell: half of the batch alone gives another gradient.
            assert ((half["gradients"][index] - expected).abs() > bound).any()
            # Both steps subtract 1/8 of the gradient, and round once.
            bound = RATE * bound + 2 * PRECISIONS["float32"].gamma(1) * (
                before[index].abs() + RATE * (expected.abs() + bound)
            )
            gap = found["parameters"][index] - single["parameters"][index]
            assert (gap.abs() <= bound).all()
    assert all(map(torch.equal, got[0]["parameters"], got[1]["parameters"]))


@pytest.mark.feature("DistributedDataParallel", "`DistributedDataParallel(model)`")
def test_ddp_takes_the_single_step(processes):
    assert_is_the_single_step(processes(ddp), share)


@pytest.mark.feature("FSDP2", "`fully_shard(layer)` for each layer, then `fully_shard(model)`")
def test_fsdp_takes_the_single_step(processes):
    assert_is_the_single_step(processes(fsdp), share)


@pytest.mark.feature(
    "tensor parallel", '`parallelize_module(model, mesh, {"0": ColwiseParallel(), ...})`'
)
def test_tensor_parallel_takes_the_single_step(processes):
    assert_is_the_single_step(processes(tensor_parallel), lambda rank: slice(None))


@pytest.mark.feature("DTensor parameters", "`distribute_module(model, mesh, ...)`")
def test_dtensor_takes_the_single_step(processes):
    assert_is_the_single_step(processes(dtensor), lambda rank: slice(None))


@pytest.mark.feature(
    "FSDP2 from the meta device",
    '`fully_shard`, `to_empty(device="cpu")`, then `reset_parameters()` of each `Dense`',
)
def test_fsdp_from_meta_draws_on_every_process(processes):
    # torch keeps generators in step on accelerators alone. On the CPU each process fills its rows
    # from its own generator, exactly as a layer with that many neurons does; so the processes need
    # different seeds, or their rows are the same.
    expected = []
    for rank in range(WORLD):
        torch.manual_seed(rank)
        rows = [Dense(2, 4), Dense(8, 2 - rank)]  # 3 rows are 2 and 1
        expected.append([p for layer in rows for p in layer.parameters()])
    for found in processes(fsdp_from_meta):
        for parameter, parts in zip(found["parameters"], zip(*expected, strict=True), strict=True):
            assert torch.equal(parameter, torch.cat(parts))


# torch warns that one process is one process, also when it is asked for.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavail:UserWarning")
@pytest.mark.feature(
    "distributed checkpoint", "`torch.distributed.checkpoint.save` on two processes, `load` in one"
)
def test_checkpoint_of_two_processes_loads_in_one(processes, results):
    import torch.distributed.checkpoint as dcp

    processes(checkpoint)
    state = {"model": classifier(2, 8, 3).state_dict()}
    dcp.load(state, checkpoint_id=results[0] / "checkpoint", no_dist=True)
    model = classifier(2, 8, 3)
    model.load_state_dict(state["model"])
    assert all(map(torch.equal, model.parameters(), quarters().parameters()))


def assert_is_the_book(got):
    expected = list(classifier(2, 8, 3, generator=np.random.RandomState(0)).parameters())
    for found in got:
        assert all(map(torch.equal, found["parameters"], expected))


@pytest.mark.feature(
    "the book's weights, sharded", "`fully_shard(classifier(2, 8, 3, generator=RandomState(0)))`"
)
def test_the_books_weights_can_be_sharded(processes):
    assert_is_the_book(processes(fsdp_of_the_book))


@pytest.mark.feature(
    "the book's weights, drawn into shards", "`layer.reset_parameters(RandomState(0))` after FSDP2"
)
def test_the_books_weights_can_be_drawn_into_shards(processes):
    assert_is_the_book(processes(fsdp_of_the_book_from_meta))


# The documented example ---------------------------------------------------------------------------


#: At the end of the example: the group's threads are gone, so none can abort the exit of Python.
THREADS = """
import pathlib
names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.feature("torchrun", "`torchrun --nproc-per-node 2 train.py`: docs/scale-out.md")
def test_the_documented_example_runs(tmp_path):
    text = DOC.read_text()
    (script,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "train.py").write_text(script + THREADS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
    command += ["--standalone", "--local-addr", "127.0.0.1", "train.py"]
    log = tmp_path / "log"
    with log.open("w") as errors:
        launcher = subprocess.Popen(
            command, cwd=tmp_path, env=alone(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            printed, _ = launcher.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends its two children, which a kill would leave behind
            pytest.fail(f"out of time\n{log.read_text()}", pytrace=False)
        finally:
            try:
                launcher.wait(30)
            finally:
                launcher.kill()
                launcher.stdout.close()
    assert launcher.returncode == 0, log.read_text()
    (block,) = re.findall(r"```text\n(.*?)```", text, re.S)

    # The same training on the whole batch, in one process.
    stream = np.random.RandomState(0)
    input, target = spiral(100, 3, generator=stream)
    model = classifier(2, 64, 3, generator=stream)[:-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    losses = []
    for _ in range(51):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(input), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for lines in (printed, block):
        assert re.findall(r"epoch (\d+): .* on 2 processes\n", lines) == ["0", "25", "50"]
        said = [float(number) for number in re.findall(r"loss (\d\.\d{4}) ", lines)]
        # Half of the last printed digit; and rounding, which training makes grow: over 150 orders
        # of the 300 rows, the losses in one process were at most 4e-7 apart.
        assert said == pytest.approx(losses[::25], abs=0.00005 + 0.000002)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
