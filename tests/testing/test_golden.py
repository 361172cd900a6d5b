import io
import json
import os
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from torchnnfs import Dense, ReLU, classifier, compare
from torchnnfs.__main__ import main
from torchnnfs.testing import Candidate
from torchnnfs.testing.candidates import devices_here


@pytest.fixture
def golden(chapter, tmp_path):
    name = str(tmp_path / "golden.npz")
    here = [Candidate("eager", device) for device in devices_here()]
    candidates = [*here, Candidate(dtype=torch.bfloat16), "numpy"]
    compare(*chapter, candidates=candidates).save_golden(name)
    return name


def change(name, edit):
    """Edit the arrays of a file and write it again."""
    with np.load(name) as file:
        arrays = dict(file)
    edit(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with open(name, "wb") as file:
        file.write(buffer.getvalue())


def changed(**entries):
    """An edit of the first run's entries."""

    def edit(arrays):
        about = json.loads(arrays["about"].tobytes())
        run = about["runs"][0]
        run["dict"] = [*({**dict(run["dict"]), **entries}).items()]
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)

    return edit


def renamed(name):
    return changed(name=name)


def test_what_was_recorded_is_judged_as_if_it_ran_here(chapter, golden):
    first = compare(*chapter, candidates=["eager"])
    comparison = compare(*chapter, candidates=["eager"], golden_file=golden)
    assert comparison.ok, comparison
    ours = [row for row in comparison.rows if not row.candidate.startswith("golden")]
    theirs = [row for row in comparison.rows if row.candidate == "golden eager"]
    assert len(ours) == len(first.rows)
    assert [row.max_abs for row in theirs[:4]] == [row.max_abs for row in ours[:4]]
    assert theirs[0].device.startswith("cpu (")
    assert {row.dtype for row in theirs} == {"float32", "bfloat16"}
    assert any(row.candidate == "golden numpy" for row in comparison.rows)


def test_a_wrong_recording_is_a_divergence(chapter, tmp_path, monkeypatch):
    name = str(tmp_path / "wrong.npz")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "relu", lambda input, inplace: input)
        compare(*chapter, candidates=["eager"]).save_golden(name)
    comparison = compare(*chapter, candidates=["eager"], golden_file=name)
    assert comparison.first_divergence.candidate == "golden eager"
    assert comparison.first_divergence.layer == "1"


def test_other_data_or_another_network_is_refused(chapter, golden):
    model, points = chapter
    with pytest.raises(ValueError, match="was made from another input"):
        compare(model, points * 2, golden_file=golden)
    with pytest.raises(ValueError, match=r"was made from another parameter 0.weight"):
        compare(classifier(2, 3, 3), points, golden_file=golden)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.pop("array 9"), "is damaged: KeyError"),
        (renamed("\x1b[31m"), r"is damaged: .* a line of text, got '\\x1b\[31m'"),
        (renamed("a\nb"), r"is damaged: .* a line of text, got 'a\\nb'"),
        (renamed("a" * 201), "is damaged: .* a line of text"),
        (renamed(5), "is damaged: .* a line of text, got 5"),
        (changed(dtype="int8"), "is damaged: .*unknown dtype 'int8'"),
        (changed(calls=5), "is damaged: TypeError"),
        (changed(output=None), "is damaged: .*a run without an output"),
        (changed(more=1), "is damaged: .*a run has the entries"),
        (lambda a: a.update({"array 6": np.ones((2, 9))}), "is damaged: "),
        (lambda a: a.update({"array 6": np.array(["a"])}), "an array of <U1 in shape"),
        (lambda a: a.update({"array 6": np.array([{}], object)}), "an array of object in shape"),
        (lambda a: a.update({"input": a["input"] * np.nan}), "was made from another input"),
        (lambda a: a.pop("about"), "is no golden file"),
        (lambda a: a.update(about=np.frombuffer(b"{}", np.uint8)), "is no golden file"),
        (lambda a: a.update(about=np.array([{}], object)), "is no golden file"),
    ],
)
def test_damage_is_found(chapter, golden, edit, message):
    change(golden, edit)
    with pytest.raises(ValueError, match=message):
        compare(*chapter, golden_file=golden)


def test_another_version_is_refused(chapter, golden):
    def newer(arrays):
        about = json.loads(arrays["about"].tobytes())
        about["version"] = 4
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)

    change(golden, newer)
    with pytest.raises(ValueError, match="has version 4 of the format, expected 3"):
        compare(*chapter, golden_file=golden)


def test_on_the_command_line(tmp_path, capsys):
    name = str(tmp_path / "golden.npz")
    command = ["compare", "--candidates", "eager", "--no-controls", "--device", "cpu"]
    assert main([*command, "--save-golden", name]) == 0
    assert main([*command, "--golden", name]) == 0
    assert "golden eager" in capsys.readouterr().out
    assert main([*command, "--golden", name, "--seed", "1"]) == 2
    assert "was made from another input" in capsys.readouterr().err
    assert main([*command, "--golden", "nowhere.npz"]) == 2
    assert main([*command, "--save-golden", "/nowhere/a.npz"]) == 2


def test_a_network_of_other_layers_is_refused(tmp_path):
    name = str(tmp_path / "golden.npz")
    with_relu = torch.nn.Sequential(Dense(2, 3), ReLU(), Dense(3, 3))
    without = torch.nn.Sequential()
    without.add_module("0", with_relu[0])
    without.add_module("2", with_relu[2])
    points = torch.randn(5, 2)
    compare(with_relu, points).save_golden(name)
    with pytest.raises(ValueError, match="was made from another network; it takes"):
        compare(without, points, golden_file=name)


def test_a_file_without_runs_is_refused(chapter, golden):
    def fewer(arrays):
        about = json.loads(arrays["about"].tobytes())
        about["runs"] = []
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)

    change(golden, fewer)
    with pytest.raises(ValueError, match="holds no runs"):
        compare(*chapter, golden_file=golden)


def test_what_would_unpack_to_too_much_is_not_read(chapter, golden, monkeypatch):
    with zipfile.ZipFile(golden, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("more.npy", bytes(5_000_000))
    assert os.path.getsize(golden) < 100_000
    monkeypatch.setattr("torchnnfs.testing.golden.MOST_BYTES", 4_000_000)
    with pytest.raises(ValueError, match=r"would unpack to \d+ bytes, more than the 4000000"):
        compare(*chapter, golden_file=golden)


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 62, 1 << 62), (-1,), (0, 1 << 62)])
def test_a_declared_shape_takes_no_memory(chapter, golden, shape):
    head = io.BytesIO()
    described = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, described)
    with zipfile.ZipFile(golden, "a") as file:
        file.writestr("more.npy", head.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"{re.escape(repr(golden))} is no golden file"):
            compare(*chapter, candidates=["eager"], golden_file=golden)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_a_device_is_no_golden_file(chapter):
    with pytest.raises(ValueError, match=r"'/dev/zero' is no golden file: .* no regular file"):
        compare(*chapter, golden_file="/dev/zero")
