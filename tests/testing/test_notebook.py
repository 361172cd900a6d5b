"""The whole chapter in a notebook, executed in Jupyter's own kernel and looked at in a browser."""

import re
import textwrap

import pytest

nbformat = pytest.importorskip("nbformat", reason="a notebook needs nbformat")
nbclient = pytest.importorskip("nbclient", reason="executing a notebook needs nbclient")
nbconvert = pytest.importorskip("nbconvert", reason="showing a notebook needs nbconvert")
pytest.importorskip("ipykernel", reason="executing a notebook needs ipykernel")
pytest.importorskip("matplotlib", reason="the notebook's pictures need matplotlib")

#: The chapter's cells, and what each prints.
CELLS = [
    (
        """
        inputs = [0, 2, -1, 3.3, -2.7, 1.1, 2.2, -100]
        print([i if i > 0 else 0 for i in inputs])
        print([max(0, i) for i in inputs])
        """,
        ["[0, 2, 0, 3.3, 0, 1.1, 2.2, 0]"] * 2,
    ),
    (
        """
        import numpy as np

        print(np.maximum(0, inputs))
        """,
        ["[0.  2.  0.  3.3 0.  1.1 2.2 0. ]"],
    ),
    (
        """
        import nnfs
        from nnfs.datasets import spiral_data

        nnfs.init()

        class Layer_Dense:
            def __init__(self, n_inputs, n_neurons):
                self.weights = 0.01 * np.random.randn(n_inputs, n_neurons)
                self.biases = np.zeros((1, n_neurons))

            def forward(self, inputs):
                self.output = np.dot(inputs, self.weights) + self.biases

        class Activation_ReLU:
            def forward(self, inputs):
                self.output = np.maximum(0, inputs)

        X, y = spiral_data(samples=100, classes=3)
        dense1, activation1 = Layer_Dense(2, 3), Activation_ReLU()
        dense1.forward(X)
        activation1.forward(dense1.output)
        print(activation1.output[1:5, 1])
        """,
        ["[0.00011395 0.00031729 0.00052666 0.00071401]"],
    ),
    (
        """
        layer_outputs = [4.8, 1.21, 2.385]
        exp_values = np.exp(layer_outputs)
        print(exp_values, exp_values / np.sum(exp_values))
        """,
        ["[121.51041752   3.35348465  10.85906266] [0.89528266 0.02470831 0.08000903]"],
    ),
    (
        """
        class Activation_Softmax:
            def forward(self, inputs):
                exp_values = np.exp(inputs - np.max(inputs, axis=1, keepdims=True))
                self.output = exp_values / np.sum(exp_values, axis=1, keepdims=True)

        softmax = Activation_Softmax()
        for row in [1, 2, 3], [-2, -1, 0]:
            softmax.forward([row])
            print(softmax.output)
        """,
        ["[[0.09003057 0.24472847 0.66524096]]"] * 2,
    ),
    (
        """
        X, y = spiral_data(samples=100, classes=3)
        book = [Layer_Dense(2, 3), Activation_ReLU(), Layer_Dense(3, 3), Activation_Softmax()]
        output = X
        for layer in book:
            layer.forward(output)
            output = layer.output
        print(output[:2])
        """,
        ["[[0.33333334 0.33333334 0.33333334]", " [0.33333334 0.33333334 0.33333334]]"],
    ),
    (
        """
        import torch
        from torchnnfs import Dense, ReLU, Softmax, compare

        model = torch.nn.Sequential(
            Dense.from_numpy(book[0].weights, book[0].biases),
            ReLU(),
            Dense.from_numpy(book[2].weights, book[2].biases),
            Softmax(),
        )
        print(model(torch.from_numpy(X))[:1].detach())
        """,
        ["tensor([[0.3333, 0.3333, 0.3333]])"],
    ),
    ("compare(model, torch.from_numpy(X), reference=book)", None),
    ("print(np.zeros(1).dtype, np.dot(np.eye(2), X[1]).dtype)", ["float32 float32"]),
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook with what a kernel printed and showed."""
    home = tmp_path_factory.mktemp("jupyter")
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(code).strip()) for code, _ in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
            patch.setenv(name, str(home))
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        nbclient.NotebookClient(notebook, timeout=120).execute()
    return notebook


def test_every_cell_prints_what_the_chapter_prints(executed):
    for cell, (_, printed) in zip(executed.cells, CELLS, strict=True):
        if printed is not None:
            (output,) = cell.outputs
            assert (output.name, output.text.splitlines()) == ("stdout", printed)


def test_the_comparison_is_shown_with_its_pictures(executed):
    (output,) = executed.cells[-2].outputs
    shown = output.data["text/html"]
    assert "<b>Agrees</b>" in shown
    assert shown.count("<svg") == 3
    assert re.findall(r"<details>\s*<summary>(.*?)</summary>", shown)[0] == "Remarks"
    assert "<details open>" not in shown


#: What a browser makes of the report, under Jupyter's own rules for tables.
MEASURE = """
<script>
const report = document.querySelector(".torchnnfs");
const heights = [...report.querySelectorAll("tbody tr")].slice(0, 12).map(row => row.offsetHeight);
const first = report.querySelector("tbody tr:nth-child(2) th, tbody tr:nth-child(2) td");
document.body.dataset.measured = [report.offsetHeight, Math.max(...heights),
  getComputedStyle(first).textAlign, getComputedStyle(document.body).backgroundColor,
  getComputedStyle(first).color].join("|");
</script>
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_jupyters_style_the_comparison_is_small_and_legible(executed, theme, browser):
    exporter = nbconvert.HTMLExporter(theme=theme)
    document = re.sub(r"(?s)<script.*?</script>", "", exporter.from_notebook_node(executed)[0])
    (measured,) = browser(document.replace("</body>", f"{MEASURE}</body>"))
    height, row, align, paper, ink = measured.split("|")
    assert 200 < int(height) <= 500
    assert 15 < int(row) < 30  # one line of text: no word is broken
    assert align == "left"
    bright = [sum(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in (paper, ink)]
    assert (bright[0] > bright[1]) == (theme == "light")
    assert abs(bright[0] - bright[1]) > 400
