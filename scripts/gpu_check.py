"""Record the bits that the book's dialect gives on a device, as digests that tests check against.

    .venv/bin/python scripts/gpu_check.py --device cuda --json results/bits-cuda.json

The inputs are drawn by NumPy, so they are the same everywhere; the digests are to be as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from torchnnfs import book, classifier, spiral
from torchnnfs.testing.environment import describe


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().numpy().astype("<f4").tobytes()).hexdigest()


def bits(device: torch.device | str) -> dict[str, str]:
    """SHA-256 of each output: the chapter, wide and deep networks, and extreme logits."""
    result = {}
    cases = {"chapter": ([2, 3, 3], 1.0), "deep": ([2, 64, 64, 10], 30.0), "wide": ([50, 300], 9.0)}
    for name, (widths, scale) in cases.items():
        stream = np.random.RandomState(0)
        if name == "chapter":
            points = spiral(generator=stream, device=device)[0]
        else:
            points = torch.from_numpy(stream.randn(500, widths[0]).astype(np.float32)).to(device)
        model = book.from_torch(classifier(*widths, generator=stream, device=device))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
            result[name] = digest(model(points))
    logits = np.random.RandomState(0).randn(20_000, 11).astype(np.float32)
    logits *= np.logspace(-6, 2, 20_000, dtype=np.float32)[:, None]
    softmax = book.Activation_Softmax()
    result["softmax"] = digest(softmax.forward(torch.from_numpy(logits).to(device)))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = bits(arguments.device)
    document = {
        "command": " ".join(["scripts/gpu_check.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": describe([arguments.device]),
        "bits": found,
    }
    print(json.dumps(document, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if arguments.device == "cpu" or found == bits("cpu") else 1


if __name__ == "__main__":
    sys.exit(main())
