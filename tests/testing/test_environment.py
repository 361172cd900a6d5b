import pytest
import torch

from torchnnfs.testing import environment
from torchnnfs.testing.environment import describe, precision_notes


def test_describe_names_versions_and_devices():
    facts = describe(["cpu", "cpu"])
    assert facts["torch"] == torch.__version__
    assert "thread" in facts["device cpu"]
    assert facts["TF32"] in ("on", "off")


@pytest.mark.parametrize(
    ("rows", "tf32", "precision", "words"),
    [
        ([("cuda:0", "float32", False)], True, "high", "TF32 is on"),
        ([("cuda:0", "float32", True)], True, "high", None),
        ([("cpu", "float32", False)], True, "medium", "matmul precision is 'medium'"),
        ([("cpu", "float32", False)], False, "highest", None),
        ([("cpu", "float64", False)], True, "high", None),
    ],
)
def test_a_lower_precision_is_named_where_it_may_be_the_cause(
    rows, tf32, precision, words, monkeypatch
):
    monkeypatch.setattr(environment, "tf32_is_on", lambda: tf32)
    monkeypatch.setattr(environment, "matmul_precision", lambda: precision)
    notes = precision_notes(rows)
    assert [words in note for note in notes] == ([True] if words else [])


def test_reduced_precision_reductions_are_named(monkeypatch):
    class Flags:
        allow_bf16_reduced_precision_reduction = True
        allow_fp16_reduced_precision_reduction = False

    monkeypatch.setattr(torch.backends.cuda, "matmul", Flags)
    notes = precision_notes([("cuda:0", "bfloat16", True), ("cuda:0", "float16", True)])
    assert len(notes) == 1
    assert "allow_bf16_reduced_precision_reduction is on" in notes[0]
    assert precision_notes([("cpu", "bfloat16", True)]) == []


def test_the_settings_of_the_process_are_read():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert environment.matmul_precision() == "high"
        assert environment.tf32_is_on()
        torch.set_float32_matmul_precision("highest")
        assert not environment.tf32_is_on()
    finally:
        torch.set_float32_matmul_precision(before)
