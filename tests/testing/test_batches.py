"""Inputs in batches and in several processes: the rows are those of the whole."""

import json
import os
import socket
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
    whole = compare(model, INPUT.to(dtype), **QUICK)
    assert whole.ok
    same_rows(whole, compare(model, list(INPUT.to(dtype).split(size)), **QUICK))


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
    with pytest.raises(ValueError, match=r"for the output to have .* the batches, 210, got 209"):
        compare(MODEL, list(INPUT.split(100)), reference=exact[:209], **QUICK)


@pytest.mark.parametrize(
    ("input", "keywords", "message"),
    [
        ([INPUT, INPUT], {"backward": True, "target": TARGET}, "backward expects one batch.*list"),
        ([INPUT, INPUT], {"golden_file": "g.npz"}, "a golden file expects one batch.*list"),
        ([], {}, "at least one batch, got an empty iterable"),
        ([INPUT, INPUT * torch.inf], {}, "got .* in input at"),
    ],
)
def test_what_needs_the_whole_is_refused(input, keywords, message):
    with pytest.raises(ValueError, match=message):
        compare(MODEL, input, **{**QUICK, **keywords})


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


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def test_command_line_takes_batches_by_itself(tmp_path, capsys, monkeypatch):
    command = ["compare", "--samples", "400", "--device", "cpu", "--no-controls", "--json"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    monkeypatch.setattr("torchnnfs.testing.batches.ROWS", 500)
    assert main([*command, str(tmp_path / "parts")]) == 0
    assert "1200 rows in 3 batches" in capsys.readouterr().out.replace("\n", " ")
    same_rows(rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"))


def test_two_processes_share_the_batches(tmp_path):
    command = ["compare", "--samples", "400", "--device", "cpu", "--no-controls", "--json"]
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
    same_rows(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"))


KILLED = """
import os, signal, torch.distributed as dist
dist.init_process_group("gloo")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_ends_the_run():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = ["-m", "torchnnfs", "compare", "--device", "cpu", "--no-controls"]
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **there, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate((command, ["-c", KILLED]))
    ]
    _, words = started[0].communicate(timeout=60)
    started[1].communicate(timeout=60)
    assert started[0].returncode == 2
    assert "expects 2 processes to the end, but one of them has stopped" in words


def test_a_world_without_a_meeting_place_is_one_process(monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "--no-controls", "--candidates", "eager"]) == 0
    assert "processes" not in capsys.readouterr().out
