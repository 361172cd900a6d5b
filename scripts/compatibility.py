"""Run the compatibility tests and write docs/compatibility.md, a line for each feature they prove.

    .venv/bin/python scripts/compatibility.py
    .venv/bin/python scripts/compatibility.py --check
    .venv/bin/python scripts/compatibility.py --record FILE
    .venv/bin/python scripts/compatibility.py --picture docs/decision-regions.png

--check writes nothing and exits with 1 when the page on disk is not what the tests give now.
Numbers of versions do not count, nor does a result where a line is not run, here or on the page: a
machine without a GPU or without some optional package can check the page all the same.

--record takes what `pytest tests/compatibility --compatibility FILE` wrote down, and runs nothing.

A line that is not run here has the result that a results/compatibility-*.json records, if one does:
a file that --compatibility wrote on another machine.

--picture draws what docs/training.md shows, and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
ORDER = ["contract", "transformations", "counts", "training", "scale_out", "ecosystem"]
NOT_RUN = "not run here"

TEXT = """\
# What works with these layers

`Dense`, `ReLU` and `Softmax` are an `nn.Linear`, an `nn.ReLU` and an `nn.Softmax`, so what works
with those works with these. Behind each line below stands a test in `tests/compatibility`. Results
have the same bits as those of torch's layers or operations on the same parameters. Where a compiler
computes in another order, they are within what rounding explains. "Not run here" claims nothing.
`.venv/bin/python scripts/compatibility.py` runs the tests and writes this page.

## Tools that ask for the exact type

Some tools look a layer's exact type up in a table, and pass over a subclass, ours as anybody's,
without a word: `torch.ao.quantization.quantize_dynamic`, the sparsifiers of `torch.ao.pruning`,
Captum's DeepLift, and thop and ptflops, which then count too little. FX takes for a leaf what is
defined in `torch.nn`, and traces through other classes. For them there is `to_torch`, a copy with
torch's own classes and the same parameters, and `from_torch`, the way back:

```python
>>> from torch import nn
>>> from torchnnfs import classifier, from_torch, to_torch
>>> model = classifier(2, 3)
>>> to_torch(model)
Sequential(
  (0): Linear(in_features=2, out_features=3, bias=True)
  (1): Softmax(dim=-1)
)
>>> type(to_torch(model)[0]) is nn.Linear, from_torch(to_torch(model))[0]
(True, Dense(in_features=2, out_features=3, bias=True))

```

Both replace layers of exactly these types: a subclass of your own, a parametrized layer or a
`LazyDense` before its first call stays what it is.
"""

Line = dict[str, object]


def run_tests() -> list[Line]:
    """What the tests say here, also when some fail."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        command = [sys.executable, "-m", "pytest", "-q", "tests/compatibility"]
        subprocess.run([*command, "--compatibility", str(file)], cwd=ROOT, check=False)
        return json.loads(file.read_text())


def with_records(lines: list[Line]) -> list[Line]:
    """`lines`, and where one is not run here, what a machine that ran it has recorded."""
    recorded = {}
    for file in sorted((ROOT / "results").glob("compatibility-*.json")):
        for line in json.loads(file.read_text()):
            if not str(line["result"]).startswith(NOT_RUN):
                result = f"{line['result']} (results/{file.name})"
                recorded[line["group"], line["feature"]] = {**line, "result": result}
    return [
        recorded.get((line["group"], line["feature"]), line)
        if str(line["result"]).startswith(NOT_RUN)
        else line
        for line in lines
    ]


def page(lines: list[Line]) -> str:
    """The page: a table for each group, in the order of the tests."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(str(line["group"]), []).append(line)
    text = [TEXT]
    for group in sorted(groups, key=lambda name: (*(name != each for each in ORDER), name)):
        text += [f"## {groups[group][0]['title']}\n"]
        text += ["| feature | how to use it | tested with | result |", "| --- | --- | --- | --- |"]
        for line in groups[group]:
            versions = line["versions"]
            tested = ", ".join(f"{name} {v.split('+')[0]}" for name, v in versions.items())
            if str(line["result"]).startswith(NOT_RUN):
                tested = ""
            cells = [str(line["feature"]), str(line["how"]), tested, str(line["result"])]
            text.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        text[-1] += "\n"
    return "\n".join(text)


def claims(text: str) -> tuple[list[str], dict[tuple[str, str, str], str]]:
    """A page without versions: its words, and the result of each line by heading, name and use."""
    words, results, heading = [], {}, ""
    for line in text.splitlines():
        heading = line if line.startswith("#") else heading
        if line.startswith("| "):
            feature, how, _, result = re.split(r"(?<!\\)\|", line)[1:5]
            result = re.sub(r" \(results/.*\)$", "", result.strip())
            results[heading, feature.strip(), how.strip()] = result
        else:
            words.append(line)
    return words, results


def differences(on_disk: str, generated: str) -> list[str]:
    """In which lines the two pages say something different."""
    (words, results), (new_words, new_results) = claims(on_disk), claims(generated)
    found = [] if words == new_words else ["the text, the headings or the order of the groups"]
    if [*results] != [*new_results] and results.keys() == new_results.keys():
        found.append("the order of the lines")
    for key in sorted(results.keys() | new_results.keys()):
        before, now = results.get(key, "no such line"), new_results.get(key, "no such line")
        if before != now and not (before.startswith(NOT_RUN) or now.startswith(NOT_RUN)):
            found.append(f"{' '.join(key)}: {before!r} on disk, {now!r} now")
    return found


def picture(file: Path) -> None:
    """Train as docs/training.md does, and draw which class the network sees where."""
    import matplotlib
    import numpy as np
    import torch
    from torch import nn

    from torchnnfs import classifier, spiral

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)  # tensors of this size gain nothing from more
    stream = np.random.RandomState(0)
    input, target = spiral(100, 3, generator=stream)
    model = classifier(2, 64, 3, generator=stream)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loss_function = nn.CrossEntropyLoss()
    for _ in range(10_000):
        logits = model[:-1](input)
        accuracy = (logits.argmax(-1) == target).float().mean().item()
        if accuracy >= 0.95:
            break
        optimizer.zero_grad()
        loss_function(logits, target).backward()
        optimizer.step()
    axis = torch.linspace(-1.1, 1.1, 440)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        share = model(grid).reshape(440, 440, 3).transpose(0, 1)
    colours = torch.tensor([[0.12, 0.47, 0.71], [0.90, 0.45, 0.05], [0.17, 0.55, 0.25]])
    # Each point has the mixture of the colours that its probabilities give, made paler.
    shades = 1 - 0.55 * (1 - share @ colours)
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.imshow(shades.numpy(), origin="lower", extent=(-1.1, 1.1, -1.1, 1.1))
    for index, (colour, marker) in enumerate(zip(colours.numpy(), "os^", strict=True)):
        x, y = input[target == index].T
        look = {"color": [colour], "marker": marker, "edgecolors": "white", "linewidths": 0.5}
        axes.scatter(x, y, s=16, label=f"class {index}", **look)
    axes.set_title(
        f"classifier(2, 64, 3) after training\n{accuracy:.0%} of the 300 training points are right",
        fontsize=10,
    )
    axes.set_xlabel("first feature")
    axes.set_ylabel("second feature")
    axes.legend(loc="upper left", title="training points")
    axes.set_xticks([-1, 0, 1])
    axes.set_yticks([-1, 0, 1])
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when it differs")
    parser.add_argument("--record", type=Path, metavar="FILE", help="what pytest wrote down")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw docs/training.md's")
    arguments = parser.parse_args()
    if arguments.picture:
        picture(arguments.picture)
        return 0
    lines = json.loads(arguments.record.read_text()) if arguments.record else run_tests()
    failed = [line for line in lines if line["result"] == "fails"]
    for line in failed:
        print(f"fails: {line['group']}, {line['feature']}")
    generated = page(with_records(lines))
    if not arguments.check:
        PAGE.write_text(generated)
        return 1 if failed else 0
    found = differences(PAGE.read_text() if PAGE.exists() else "", generated)
    for difference in found:
        print(f"{PAGE.relative_to(ROOT)} differs: {difference}")
    return 1 if found or failed else 0


if __name__ == "__main__":
    sys.exit(main())
