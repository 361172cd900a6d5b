import re
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from torchnnfs.testing.page import PAGE, compute, show


def printed(computed, width=80):
    console = Console(file=StringIO(), width=width, color_system=None)
    return show(computed, console), console.file.getvalue()


@pytest.fixture(scope="module")
def computed():
    return compute(torch.device("cpu"))


@pytest.mark.parametrize("width", [80, 30])
def test_the_books_page_comes_first_digit_for_digit(computed, width):
    right, text = printed(computed, width)
    assert right
    title, page, rest = text.partition(PAGE)
    assert (title, page) == ("torchnnfs.book on cpu\n", PAGE)
    assert "\ntorchnnfs.book on cpu prints what the book prints, digit for digit.\n" in rest
    assert f"\nNumPy {np.__version__}\n[[0.3333" in rest
    assert f"\ntorch {torch.__version__} in float32 on cpu\n[[0.3333" in rest


def test_a_digit_that_is_not_the_books_is_marked_and_explained(computed):
    (title, steps), *_ = computed.items()
    exp, softmax = steps["exp"].copy(), steps["softmax"].copy()
    exp[4, 1], softmax[4, 1] = np.nextafter(exp[4, 1], 2), 0.33333248
    wrong = {title: steps, "another": {**steps, "exp": exp, "softmax": softmax}}
    right, text = printed(wrong)
    assert right
    last = PAGE.splitlines()[-1].replace("0.3333324 ", "0.33333248")
    assert text.count("^") == 2  # under the digit, and where it is explained
    assert f"{last}\n{' ' * last.index('48')} ^\n" in text
    reason = "because its float32 exp is an approximation, which is not correctly rounded."
    said = f"another: 1 of the 900 numbers in all 300 rows differ after exp, {reason}"
    assert "\n^ marks a digit that is not the book's.\n" in text
    assert f"\n{said}\n" in text


def test_a_page_that_is_not_the_books_is_wrong(computed):
    (title, steps), *_ = computed.items()
    right, text = printed({title: {**steps, "softmax": steps["softmax"] + np.float32(1e-7)}})
    assert not right
    assert f"\n{title} prints other digits.\n" in text
    assert text.count("^") >= 15


def test_each_rival_says_where_its_bits_first_differ_and_why(computed):
    (_, ours), *rivals = computed.items()
    _, text = printed(computed)
    assert len(rivals) == 2
    for title, steps in rivals:
        differ = {step: np.count_nonzero(steps[step] != ours[step]) for step in ours}
        first = next((step for step, count in differ.items() if count), None)
        (said,) = re.findall(rf"^{re.escape(title)}: (.*)", text, re.MULTILINE)
        if first is None:
            assert said == "no bit differs in all 300 rows."
        else:
            count = f"{differ[first]} of the 900 numbers in all 300 rows differ"
            assert said.startswith(f"{count} after {first}, because")
