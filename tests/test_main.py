import importlib
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from torchnnfs.__main__ import main
from torchnnfs.testing import candidates
from torchnnfs.testing.files import write_whole


def test_compare_prints_what_was_run(capsys):
    assert main(["compare", "--device", "cpu", "--candidates", "eager", "numpy"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^network: +2 -> 3 -> 3", out, re.M)
    assert re.search(r"^data: +spiral, 100 samples x 3 classes = 300 rows", out, re.M)
    for name in (
        "seed",
        "torch",
        "numpy",
        "nnfs",
        "device cpu",
        "float32 matmul precision",
        "TF32",
    ):
        assert re.search(rf"^{name}: +\S", out, re.M)
    assert "[[0.33333334 0.33333334 0.33333334]\n [0.3333331" in out
    assert len(re.findall(r"│ ok +│", out)) == 8
    last = out.splitlines()[-1]
    assert last.startswith("AGREES: every layer of eager in float32, numpy in float32 is within")


def test_options(capsys):
    arguments = (
        "compare --samples 5 --classes 2 --hidden 4 6 --seed 7 --dtype float64 bfloat16 "
        "--candidates eager numpy"
    )
    assert main([*arguments.split(), "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    who = list(dict.fromkeys((row["candidate"], row["dtype"]) for row in document["rows"]))
    here = len({row["device"] for row in document["rows"]})
    assert who == [("eager", "float64"), ("eager", "bfloat16"), ("numpy", "float32")]
    assert len(document["rows"]) == 6 * (2 * here + 1)


def test_a_disagreement_exits_with_1(capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "relu", lambda input, inplace: input)
    assert main(["compare", "--candidates", "eager"]) == 1
    assert "DISAGREES: eager on cpu in float32, layer 1 ReLU" in capsys.readouterr().out


def test_json_to_a_file_is_written_whole(tmp_path, capsys):
    target = tmp_path / "out.json"
    target.write_text("old")
    assert main(["compare", "--candidates", "eager", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["ok"] is True
    assert os.listdir(tmp_path) == ["out.json"]
    assert "AGREES" in capsys.readouterr().out


def test_a_failed_write_keeps_the_old_file_and_the_printed_result(tmp_path, capsys, monkeypatch):
    target = tmp_path / "out.json"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert main(["compare", "--candidates", "eager", "--json", str(target)]) == 2
    captured = capsys.readouterr()
    assert "AGREES" in captured.out
    assert captured.err.endswith("cannot be written: No space left on device\n")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "compar",
            "invalid choice: 'compar' (choose from 'compare', 'page'); did you mean compare?",
        ),
        (
            "compare --sample 3 --divice cpu",
            "unrecognized arguments: --divice; did you mean --device?",
        ),
        ("compare --samples 0", "spiral expects samples to be at least 1, got 0"),
        ("compare --samples ten", "argument --samples: invalid int value: 'ten'"),
        ("compare --classes 300", "at most 256 classes"),
        (
            "compare --hidden -1",
            "cannot be made: Trying to create tensor with negative dimension -1",
        ),
        ("compare --hidden 0", "classifier expects width 1 to be at least 1, got 0"),
        ("compare --seed -1", "--seed expects a number from 0 to 2**32 - 1, got -1"),
        ("compare --dtype int8", "invalid choice: 'int8'"),
        ("compare --device warp", "--device 'warp' is not on this machine; here are cpu"),
        ("compare --device cuda:99", "--device 'cuda:99' is not on this machine; here are cpu"),
        ("compare --device meta", "--device 'meta' is not on this machine; here are cpu"),
        ("page --device warp", "--device 'warp' is not on this machine; here are cpu"),
        ("compare --json /nowhere/out.json", "there is no directory '/nowhere'"),
        ("compare --json .", "--json '.' names no file"),
        ("compare --markdown=", "--markdown '' names no file"),
        ("compare --json " + "a" * 300, "cannot be written: File name too long"),
        ("compare --json a --html a", "each report and golden file needs a name of its own"),
        ("compare --json a --html ./a", "a name of its own: --html './a' is --json as well"),
        ("compare --golden g --save-golden g", "--save-golden 'g' is --golden as well"),
        ("compare --golden g --save-golden ./g", "--save-golden './g' is --golden as well"),
        ("compare --golden=", "'' is no golden file: FileNotFoundError"),
        (
            "compare --samples 99999999999999999999",
            "--samples expects a number below 2**40, got 999",
        ),
        ("compare --save-golden=", "--save-golden '' names no file"),
        ("compare --save-golden -", "each report and golden file needs a name of its own"),
        ("compare --candidates numbers", "argument --candidates: invalid choice: 'numbers'"),
        (
            "compare --hidden 100000000 100000000",
            "2 -> 100000000 -> 100000000 -> 3: Dense, ReLU, ..., Dense, Softmax cannot be made",
        ),
        (
            "compare --candidates onnx --dtype bfloat16",
            "onnx computes in float64,",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(arguments, message, capsys):
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


OWN = """
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, slope=0.0):
        super().__init__()
        self.layer, self.slope = nn.Linear(4, 3), slope
        nn.init.constant_(self.layer.bias, 0.5)

    def forward(self, x):
        return nn.functional.leaky_relu(self.layer(x), self.slope)

model, leaky = Net(), Net(0.01)
leaky.load_state_dict(model.state_dict())
weight = model.layer.weight.detach().numpy()

def trusted(x):
    return np.maximum(x @ weight.T + 0.5, 0)

def stops():
    raise SystemExit(0)

def fails():
    return {}["missing"]

def fails_in_a_library():
    return torch.nn.Linear("two", 3)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory with a module of the user's and an input."""
    (tmp_path / "usermodule.py").write_text(OWN)
    np.save(tmp_path / "x.npy", np.random.RandomState(0).randn(20, 4).astype(np.float32))
    np.savez(tmp_path / "x.npz", x=np.ones((2, 4), np.float32))
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:90])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield tmp_path
    sys.modules.pop("usermodule", None)


@pytest.mark.parametrize("input", ["x.npy", "x.npz"])
def test_a_model_of_ones_own(own, input, capsys):
    command = ["compare", "--input", input, "--reference", "usermodule:trusted"]
    assert main([*command, "usermodule:model"]) == 0
    out = capsys.readouterr().out
    assert "model:                    usermodule:model" in out
    assert out.splitlines()[-1].startswith("AGREES: every layer of eager in float32, numpy in")
    assert main(["compare", "usermodule:Net", "--input", input]) == 0
    out = capsys.readouterr().out
    assert "model:                    usermodule:Net(), made just now" in out
    assert "AGREES AS FAR AS JUDGED" in out
    np.save("y.npy", np.maximum(0, np.load("x.npy")))
    assert main(["compare", "usermodule:model", "--input", "x.npy", "--reference", "y.npy"]) == 1


def test_a_wrong_model_of_ones_own(own, capsys):
    command = ["compare", "usermodule:leaky", "--input", "x.npy"]
    assert main([*command, "--reference", "usermodule:trusted"]) == 1
    assert (
        "DISAGREES: the model on cpu in float64, the output of Net differs"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("usermodule:model", "usermodule:model needs its input: --input FILE.npy"),
        (
            "usermodule --input x.npy",
            "expected MODULE:NAME, as in mymodule:model, got 'usermodule'",
        ),
        ("usermodule.py:model --input x.npy", "expected MODULE:NAME, as in mymodule:model, got"),
        ("usermodul:model --input x.npy", "No module named 'usermodul'; is it in this directory?"),
        ("usermodule:modl --input x.npy", "usermodule has no 'modl'; did you mean 'model'?"),
        ("usermodule:weight --input x.npy", "to be a torch.nn.Module or to make one, got ndarray"),
        ("usermodule:model --input z.npy", "--input 'z.npy' cannot be read: [Errno 2] No such"),
        ("usermodule:model --input broken.npy", "--input 'broken.npy' cannot be read: "),
        ("--input x.npy", "--input is for a model of your own: name it, as mymodule:model"),
        ("--reference usermodule:trusted", "--reference is for a model of your own"),
        (
            "usermodule:trusted --input x.npy",
            "to make one without arguments, but needs x; --reference takes functions",
        ),
        ("usermodule:stops --input x.npy", "the model's own code stopped with sys.exit(0)"),
        ("usermodule:model --input damaged.npz", "--input 'damaged.npz' cannot be read: "),
        ("usermodule:model --input x.npy --samples 3", "--samples is for the book's network"),
        ("usermodule:model --input x.npy --reference usermodule:OWN", "has no 'OWN'"),
        ("usermodule:model --input x.npy --reference x.npz", "several arrays as a dictionary in"),
    ],
)
def test_wrong_usage_of_ones_own_is_one_line(own, arguments, message, capsys):
    assert main(["compare", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_type_error_from_a_library_is_no_wrong_usage(own, capsys):
    assert main(["compare", "usermodule:fails_in_a_library", "--input", "x.npy"]) == 70
    error = capsys.readouterr().err
    assert error.startswith("torchnnfs: TypeError: ")
    assert error.count("\n") == 1


def test_an_error_in_the_models_code_is_one_line_with_a_status_of_its_own(own, capsys):
    command = ["compare", "usermodule:fails", "--input", "x.npy"]
    assert main(command) == 70
    error = capsys.readouterr().err
    assert error.startswith("torchnnfs: KeyError: 'missing' (an error in the model's code")
    assert error.count("\n") == 1
    assert main([*command, "--debug"]) == 70
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "in fails" in error


def test_nothing_asked_for_shows_help(capsys):
    assert main([]) == 0
    assert "judge a model in torch against NumPy, layer by layer" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("torchnnfs ")


def test_the_installed_command_is_this_one():
    (command,) = entry_points(group="console_scripts", name="torchnnfs")
    assert command.load() is main


def test_an_absent_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(candidates.importlib.util, "find_spec", lambda name: None)
    assert main(["compare", "--candidates", "onnx"]) == 3
    line = "onnx needs onnx, onnxscript, onnxruntime: pip install 'torchnnfs[onnx]'"
    assert capsys.readouterr().err == f"torchnnfs: {line}\n"
    kinds = dict(candidates.KINDS)
    del kinds["compiled"]  # it takes a compiler and its time
    monkeypatch.setattr("torchnnfs.__main__.KINDS", kinds)
    names = [name for name in kinds if name not in ("onnx", "jax")]
    assert main(["compare", "--no-controls", "--candidates", "all"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert f"Skipped: {line}." in out
    assert "Skipped: jax needs jax: pip install 'torchnnfs[jax]'." in out


@pytest.mark.parametrize("command", ["page", "compare", "compare --json -"])
def test_a_reader_that_stops_reading_is_no_error(command, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:  # what Python writes when it exits fails no more
        monkeypatch.setattr(sys, "stdout", closed)
        assert main([*command.split(), "--device", "cpu"]) == 128 + 13
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["page"]) == 2
    assert capfd.readouterr().err == "torchnnfs: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_is_one_line_and_leaves_no_file(number, status, word, tmp_path, capsys):
    def stopped(*_):
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        command = ["compare", "--candidates", "eager", "--json", str(tmp_path / "a.json")]
        assert main(command) == status
    captured = capsys.readouterr()
    assert captured == ("", f"torchnnfs: {word}\n")
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("number", "before"), [(signal.SIGINT, "numpy"), (signal.SIGTERM, "torch.nn")]
)
def test_a_signal_while_packages_are_imported_is_one_line(number, before, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, os, signal, sys\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        "real = builtins.__import__\n"
        "def stops(name, *rest):\n"
        f"    if name == {before!r} and 'torchnnfs' in sys.modules:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = stops\n"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, "-m", "torchnnfs", "page"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (run.returncode, run.stdout) == (128 + number, "")
    assert run.stderr == f"torchnnfs: {word}\n"


def test_links_to_one_file_are_one_file(tmp_path, capsys):
    (tmp_path / "b.npz").symlink_to(tmp_path / "a.npz")
    names = [str(tmp_path / name) for name in ("a.npz", "b.npz")]
    assert main(["compare", "--golden", names[0], "--save-golden", names[1]]) == 2
    assert "is --golden as well" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["b.npz"]


def test_what_was_judged_is_kept_when_one_file_cannot_be_written(tmp_path, capsys, monkeypatch):
    real = Path.replace

    def full(self, target):
        if target.suffix == ".npz":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    names = [str(tmp_path / name) for name in ("a.npz", "a.json")]
    command = ["compare", "--candidates", "eager", "--save-golden", names[0], "--json", names[1]]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "AGREES" in captured.out
    assert captured.err == f"torchnnfs: {names[0]!r} cannot be written: No space left on device\n"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_an_existing_file_keeps_its_mode_and_a_link_its_target(tmp_path, mode):
    target, link = tmp_path / "a.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(mode)
    link.symlink_to(target)
    write_whole(str(link), b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == mode
    assert sorted(os.listdir(tmp_path)) == ["a.json", "link.json"]


def test_the_temporary_name_cannot_be_guessed(tmp_path, monkeypatch):
    names = []
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: names.append(self.name) or real(self, to))
    for _ in range(3):
        write_whole(str(tmp_path / "a"), b"")
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"\.[0-9a-f]{32}\.part", name) for name in names)


def test_help_names_each_default_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "points on each spiral arm (default: 100)" in words
    assert "default: None" not in words
    assert not re.search(r"\(default: [^)]*\) \(default", words)
    assert "70 an error of ours" in words


def test_a_short_share_of_the_fuzzing(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    ends, faults = importlib.import_module("fuzz").fuzz(60, 5)
    assert faults == []
    assert ends[2] > 20
    assert sum(ends.values()) == 60


def test_every_kind_of_report_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    names = {"json": "a.json", "markdown": "a.md", "html": "a.html", "plot": "a.png"}
    options = [part for kind, name in names.items() for part in (f"--{kind}", str(tmp_path / name))]
    assert main(["compare", "--candidates", "eager", "--backward", *options]) == 0
    out = capsys.readouterr().out
    assert "(loss) dL/doutput" in out
    assert sorted(os.listdir(tmp_path)) == sorted(names.values())
    assert "Agrees" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.md").read_text().startswith("**AGREES")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_another_kind_or_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--plot", "a.jpeg"]) == 2
    assert "pictures are .png or .svg files, got 'a.jpeg'" in capsys.readouterr().err
    monkeypatch.setattr(candidates.importlib.util, "find_spec", lambda name: None)
    assert main(["compare", "--plot", "a.png"]) == 3
    assert "plots need matplotlib: pip install 'torchnnfs[plot]'" in capsys.readouterr().err


def test_an_array_with_a_broken_header_is_wrong_input(own, tmp_path, capsys):
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole.replace(b"), }", b", } ", 1))
    assert main(["compare", "usermodule:model", "--input", "x.npy"]) == 2
    assert "--input 'x.npy' cannot be read: it is no .npy or .npz" in capsys.readouterr().err


def test_a_file_may_have_the_name_of_standard_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--no-controls", "--json", "./-"]) == 0
    assert json.loads((tmp_path / "-").read_text())["ok"]
