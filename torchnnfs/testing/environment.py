"""What the numbers of a run depend on: versions, devices and torch's settings."""

import platform
from collections.abc import Iterable
from functools import cache
from importlib import metadata

import torch

#: The newest versions that the tests have run with; constraints.txt has them in full.
TESTED = {"torch": "2.13", "numpy": "2.4", "nnfs": "0.5"}

version = cache(metadata.version)


def describe(devices: Iterable[str]) -> dict[str, str]:
    """Versions, the names of `devices`, and how torch multiplies matrices."""
    return {
        **{name: version(name) for name in TESTED},
        "python": platform.python_version(),
        **{f"device {name}": device_name(torch.device(name)) for name in dict.fromkeys(devices)},
        "float32 matmul precision": matmul_precision(),
        "TF32": "on" if tf32_is_on() else "off",
    }


def device_name(device: torch.device) -> str:
    """The name of an accelerator as its driver gives it, or what torch makes of the CPU."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
        return f"{platform.machine()}, {capability}, {threads} thread{'s' * (threads != 1)}"
    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", None)
    return str(name(device)) if name else device.type


def matmul_precision() -> str:
    """`torch.get_float32_matmul_precision`, or "mixed" where backends were set one by one."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "mixed"


def precision_notes(rows: Iterable[tuple[str, str, bool]]) -> list[str]:
    """What versions and torch's settings explain of rows of (device, dtype, ok), by name."""
    notes = []
    for name, tested in TESTED.items():
        here, newest = (list(map(int, each.split(".")[:2])) for each in (version(name), tested))
        if here > newest:
            notes.append(f"{name} {version(name)} is newer than the tests have run with: {tested}.")
    rows, beyond = list(rows), "which the bounds do not allow"
    wrong = {device.split(":")[0] for device, dtype, ok in rows if dtype == "float32" and not ok}
    if "cuda" in wrong and tf32_is_on():
        notes.append(
            "TF32 is on: the GPU rounds the factors of a float32 matrix product to 11 bits, "
            f"{beyond}. torch.backends.cuda.matmul.allow_tf32 = False turns it off."
        )
    elif wrong and matmul_precision() != "highest":
        notes.append(
            f"float32 matmul precision is {matmul_precision()!r}: torch may round the factors of a "
            f"float32 matrix product to fewer bits, {beyond}. "
            "torch.set_float32_matmul_precision('highest') forbids it."
        )
    for dtype, short in (("bfloat16", "bf16"), ("float16", "fp16")):
        flag = f"allow_{short}_reduced_precision_reduction"
        on_gpu = any(device.startswith("cuda") and each == dtype for device, each, _ in rows)
        if on_gpu and getattr(torch.backends.cuda.matmul, flag):
            on = f"torch.backends.cuda.matmul.{flag} is on"
            notes.append(f"{on}: partial sums may be rounded to {dtype}, {beyond}.")
    return notes


def tf32_is_on() -> bool:
    """Whether a CUDA device would multiply float32 matrices in TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
