"""Inputs in batches and in several processes: the rows are those of the whole."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchnnfs import ReLU, classifier, compare, spiral
from torchnnfs.__main__ import main

INPUT, TARGET = spiral(70, 3, generator=np.random.RandomState(0))
MODEL = classifier(2, 5, 3, generator=np.random.RandomState(1))
QUICK = {"candidates": ["eager"], "controls": False}


HIDDEN = MODEL[0](INPUT)[173].detach()


class WrongOnce(ReLU):
    """Off where the input is that of the point in row 173."""

    def forward(self, input):
        at = (input == HIDDEN).all(dim=-1, keepdim=True)
        return super().forward(input) + 1e-3 * at


def same_rows(one, two):
    """The same but for the last digits of sums."""
    one, two = (each if isinstance(each, list) else map(asdict, each.rows) for each in (one, two))
    for a, b in zip(one, two, strict=True):
        assert list(a["worst"]["index"]) == list(b["worst"]["index"])
        for key in a.keys() - {"worst", "reason"}:
            same = isinstance(a[key], float)
            assert a[key] == (pytest.approx(b[key], rel=1e-6) if same else b[key]), key
        assert (a["reason"] == "") == (b["reason"] == "")


@pytest.mark.parametrize("size", [1, 32, 209, 210])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_the_same_whatever_the_batches(size, dtype):
    model = classifier(2, 5, 3, generator=np.random.RandomState(1), dtype=dtype)
    input = (INPUT[::7] if size == 1 else INPUT).to(dtype)
    whole = compare(model, input, **QUICK)
    assert whole.ok
    same_rows(whole, compare(model, list(input.split(size)), **QUICK))


def test_excess_is_of_the_same_rows_of_the_whole():
    input, _ = spiral(1500, 3, generator=np.random.RandomState(0))
    whole = compare(MODEL, input, **QUICK)
    assert whole.rows[0].excess > 0
    same_rows(whole, compare(MODEL, list(input.split(700)), **QUICK))


def test_worst_element_has_its_place_in_the_whole():
    wrong = nn.Sequential(MODEL[0], WrongOnce(), *MODEL[2:])
    whole = compare(wrong, INPUT, **QUICK)
    parts = compare(wrong, list(INPUT.split(50)), **QUICK)
    assert parts.first_divergence.worst.index[0] == 173
    assert "at [173, " in parts.first_divergence.reason
    same_rows(whole, parts)


@pytest.mark.parametrize(
    "batches",
    [
        DataLoader(TensorDataset(INPUT, TARGET), batch_size=64),
        DataLoader(TensorDataset(INPUT), batch_size=64),
        [{"input": part} for part in INPUT.split(64)],
        [(part,) for part in INPUT.split(64)],
    ],
    ids=["inputs and targets", "inputs", "dictionaries", "tuples"],
)
def test_batches_have_any_form(batches):
    same_rows(compare(MODEL, INPUT, **QUICK), compare(MODEL, batches, **QUICK))


def test_references_are_taken_row_by_row():
    exact = MODEL(INPUT).detach()
    for reference in (exact, {"0": MODEL[0](INPUT).detach()}, lambda x: MODEL(x), MODEL[:]):
        whole = compare(MODEL, INPUT, reference=reference, **QUICK)
        parts = compare(MODEL, list(INPUT.split(100)), reference=reference, **QUICK)
        assert whole.ok
        assert [row.label for row in whole.rows] == [row.label for row in parts.rows]
        assert parts.ok
    exact[205] += 0.1
    row = compare(MODEL, list(INPUT.split(100)), reference=exact, **QUICK).first_divergence
    assert row.worst.index[0] == 205
    with pytest.raises(ValueError, match=r"for the output to have .* the batches, 210, got .*209"):
        compare(MODEL, list(INPUT.split(100)), reference=exact[:209], **QUICK)


@pytest.mark.parametrize(
    ("input", "keywords", "message"),
    [
        (
            [INPUT, INPUT],
            {"golden_file": "g.npz"},
            "a golden file.* expects one batch.*list.*fewer",
        ),
        ([INPUT, INPUT], {"backward": True}, "expects a target"),
        (
            [INPUT, INPUT],
            {"backward": True, "target": torch.zeros(421, dtype=torch.int64)},
            "the target to have a row for each row of the batches, 420, got .*421,",
        ),
        (
            [INPUT, INPUT.double()],
            {},
            "like the first, input in torch.float32, got input in torch.float64 in batch 1, from "
            r"row 210 on; convert it with .to\(dtype\)",
        ),
        ([], {}, "at least one batch, got an empty iterable"),
        ([INPUT, INPUT * torch.inf], {}, "got .* in input at"),
    ],
)
def test_what_batches_cannot_be_is_refused(input, keywords, message):
    with pytest.raises(ValueError, match=message):
        compare(MODEL, input, **{**QUICK, **keywords})


class WrongGradient(nn.Linear):
    def forward(self, input):
        output = super().forward(input)
        if output.requires_grad and (input == INPUT[205]).all(dim=-1).any():
            output.register_hook(lambda grad: grad * 1.001)
        return output


def test_gradients_are_those_of_each_batch():
    loader = DataLoader(TensorDataset(INPUT, TARGET), batch_size=64)
    parts = compare(MODEL, loader, backward=True, **QUICK)
    same_rows(parts, compare(MODEL, list(INPUT.split(64)), backward=True, target=TARGET, **QUICK))
    whole = compare(MODEL, INPUT, backward=True, target=TARGET, **QUICK)
    assert whole.ok
    assert parts.ok
    assert [row.label for row in parts.rows] == [row.label for row in whole.rows]
    assert "Gradients are of the mean loss of each batch" in str(parts)
    wrong = nn.Sequential(WrongGradient(2, 5), *MODEL[1:])
    row = compare(wrong, loader, backward=True, **QUICK).first_divergence
    assert (row.kind, row.worst.index[0] >= 192) == ("WrongGradient dL/dx", True)


def test_results_of_batches_are_not_kept(tmp_path):
    comparison = compare(MODEL, [INPUT, INPUT], **QUICK)
    assert comparison.traces == ()
    with pytest.raises(ValueError, match="one of batches, whose results are not kept"):
        comparison.save_golden(str(tmp_path / "g.npz"))
    assert "420 rows in 2 batches" in str(comparison)


def test_layers_that_mix_rows_are_named():
    mixing = nn.Sequential(MODEL[0], nn.Softmax(dim=0))
    words = "depends on the other rows of its batch"
    assert words in str(compare(mixing, list(INPUT.split(70)), **QUICK))
    assert words not in str(compare(MODEL, list(INPUT.split(70)), **QUICK))


def test_results_that_change_are_found_in_any_batch():
    class Fickle(nn.Module):
        def forward(self, input):
            at = (input == INPUT[150]).all(dim=-1, keepdim=True)
            return input + torch.rand(()) * at

    rows = compare(Fickle(), list(INPUT.split(100)), **QUICK).rows
    assert rows[0].basis == "not the same twice"
    assert rows[0].worst.index[0] == 150


def test_memory_is_that_of_a_batch():
    def peak(count):
        compare(MODEL, (INPUT for _ in range(3)), **QUICK)
        tracemalloc.start()
        compare(MODEL, (torch.rand(2000, 2) for _ in range(count)), **QUICK)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(40) < 1.25 * peak(20)


def rows_of(path, part="rows"):
    return json.loads(path.read_text())[part]


def test_command_line_takes_batches_by_itself(tmp_path, capsys, monkeypatch):
    command = ["compare", "--samples", "400", "--device", "cpu", "--no-controls", "--json"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    monkeypatch.setattr("torchnnfs.testing.batches.ROWS", 500)
    assert main([*command, str(tmp_path / "parts")]) == 0
    assert "1200 rows in 3 batches" in capsys.readouterr().out.replace("\n", " ")
    same_rows(rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"))
    assert main([*command, "-", "--backward"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "Gradients are of the mean loss of each batch." in document["notes"]
    assert "0 Dense dL/dW" in [f"{row['layer']} {row['kind']}" for row in document["rows"]]


def test_two_processes_share_the_batches(tmp_path):
    command = ["compare", "--samples", "400", "--device", "cpu", "--json"]
    assert main([*command, str(tmp_path / "one")]) == 0
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "torchnnfs"]
    run = subprocess.run(
        [sys.executable, "-m", *torchrun, *command, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("AGREES") == 1
    assert "2, which shared 2 batches" in run.stdout
    words = "each judged on its own; broken copies, where asked for, are tried on the first."
    assert words in rows_of(tmp_path / "two", "notes")[-1]
    same_rows(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"))
    tried = [
        [(each["name"], each["outcome"]) for each in rows_of(tmp_path / count, "controls")]
        for count in ("one", "two")
    ]
    assert tried[0] == tried[1] != []


# Both processes come from one that has imported torch already, and not from torchrun, which ends
# the others as soon as the first has ended.
PAIRS = """
import datetime, json, os, signal, socket, sys
import torch
from torchnnfs.__main__ import main
from torchnnfs.testing import processes

class Ends(torch.nn.Module):
    def forward(self, input):
        if os.environ["RANK"] == "1" and (input == 9).any():
            if end == "error":
                raise ValueError("no nines")
            if end:
                os.kill(os.getpid(), signal.Signals[end])
        return input

def pair(command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    children, statuses = [], []
    for rank in "01":
        children.append(os.fork())
        if not children[-1]:
            os.environ["RANK"] = rank
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(name + rank, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os._exit(main(command.replace("RANK", rank).split()))
    for child in children:
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if end == "SIGSTOP" and child == children[0]:
            os.kill(children[1], signal.SIGKILL)
    return statuses, open("err0").read(), open("err1").read()

model = Ends()
processes.SILENCE = datetime.timedelta(seconds=3)
for end, command in json.loads(sys.argv[1]):
    print(json.dumps(pair(command)))
"""


def test_two_processes_end_together(tmp_path):
    command = "compare __main__:model --input"
    lost = "torchnnfs: compare expects 2 processes to the end, but one of them has stopped: "
    cases = [
        # of process 1 alone, how it ends; the command; statuses; how the only line begins
        ("SIGKILL", f"{command} x.npy", [2, -9], lost),
        ("SIGSTOP", f"{command} x.npy", [2, -9], lost),
        (
            "error",
            f"{command} x.npy",
            [2, 2],
            "torchnnfs: Ends raised ValueError: no nines; the in",
        ),
        ("error", f"{command} y.npy", [2, 2], "torchnnfs: --input 'y.npy' cannot be read: "),
        ("error", "compare --sampels 3", [2, 2], "torchnnfs: unrecognized arguments: --sampels"),
        ("", f"{command} x.npy --reference z.npy", [1, 1], ""),
        ("", f"{command} RANK.npy", [2, 2], "torchnnfs: compare expects all processes to get the "),
    ]
    np.save(tmp_path / "x.npy", np.float32(range(40)).reshape(20, 2) % 15)
    for rank in range(2):
        np.save(tmp_path / f"{rank}.npy", np.float32(range(rank, 40 + rank)).reshape(20, 2))
    np.save(tmp_path / "z.npy", np.zeros((20, 2)))
    (tmp_path / "pairs.py").write_text(PAIRS)
    run = subprocess.run(
        [sys.executable, "pairs.py", json.dumps([case[:2] for case in cases])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    for case, line in zip(cases, run.stdout.splitlines(), strict=True):
        statuses, *words = json.loads(line)
        assert statuses == case[2], (case, words)
        assert words[0].startswith(case[3]), words
        assert (words[0].count("\n"), words[1]) == (bool(case[3]), "")


def test_a_world_without_a_meeting_place_is_one_process(monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "--no-controls", "--candidates", "eager"]) == 0
    assert "processes" not in capsys.readouterr().out


@pytest.mark.parametrize("extra", [0, 5])
def test_one_batch_of_an_iterable_has_as_many_rows_as_what_belongs_to_it(extra):
    model, x = classifier(2, 3), torch.randn(20, 2)
    rows = model(torch.randn(20 + extra, 2)).detach().numpy()
    classes = torch.zeros(20 + extra, dtype=torch.int64)
    if not extra:
        assert not compare(model, [x], reference=rows).ok
        assert compare(model, [x], backward=True, target=classes).ok
        return
    with pytest.raises(ValueError, match=r"the output to have a row .* 20, got .* \(25, 3\)"):
        compare(model, [x], reference=rows)
    with pytest.raises(ValueError, match=r"the target to have a row .* 20, got .* \(25,\)"):
        compare(model, [x], backward=True, target=classes)


def test_a_number_is_no_reference_for_batches():
    with pytest.raises(ValueError, match=r"a row for each row of the batches, 20, got .* \(\)"):
        compare(classifier(2, 3), [torch.randn(20, 2)], reference=np.array(3.0))


def test_a_list_of_three_is_no_batch():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="an input and its target, got 3 entries"):
        compare(classifier(2, 3), [[x, x, x]])


@pytest.mark.parametrize("reduced", ["none", "mean", "sum"])
def test_batches_may_differ_inside_and_outputs_may_have_fewer_rows(reduced):
    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            out = self.layer(x)
            return {"none": out, "mean": out.mean(0), "sum": out.sum()}[reduced]

    comparison = compare(Reduced(), [torch.randn(6, 7, 4), torch.randn(5, 9, 4)])
    assert comparison.ok
    assert len(comparison.input) <= 6
