"""Eight threads at a time give what one gives, bit for bit."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax, book, book_numpy, classifier, compare, fuse, spiral

THREADS = 8
PATCHED = [(np, "dot"), (np, "zeros"), (np, "eye"), (np.random, "randn")]


def network(seed):
    """Data and a model that no other thread has."""
    stream = np.random.RandomState(seed)
    points, target = spiral(40, 3, generator=stream)
    return classifier(2, 5, 3, generator=stream), points, target


def judged(seed):
    model, points, target = network(seed)
    result = compare(model, points, backward=True, target=target)
    return result.to_json()


def drawn(seed):
    return spiral(50, 4, generator=np.random.RandomState(seed))[0].numpy().tobytes()


def drawn_by_torch(seed):
    points, _ = spiral(50, 4, generator=torch.Generator().manual_seed(seed))
    return points.numpy().tobytes()


def in_the_dialect(seed):
    stream = np.random.RandomState(seed)
    x = spiral(40, 3, generator=stream)[0]
    target = np.eye(3, dtype=np.float32)[np.arange(120) % 3]
    layers = [book.Layer_Dense(2, 12), book.Activation_ReLU()]
    layers += [book.Layer_Dense(12, 3), book.Activation_Softmax()]
    for layer in (layers[0], layers[2]):
        layer.weights = 0.01 * stream.randn(*layer.weights.shape)
    for layer in layers:
        x = layer.forward(x)
    values = target
    for layer in reversed(layers):
        layer.backward(values)
        values = layer.dinputs
    arrays = layers[-1].output, values, layers[0].dweights, layers[2].dbiases
    return b"".join(each.tobytes() for each in arrays)


def fused(seed):
    model, points, target = network(seed)
    chain = fuse(model)
    output = chain(points)
    chain.cross_entropy(points, target).backward()
    assert chain.formulation == "kernel"
    tensors = [output, *(each.grad for each in model.parameters())]
    return b"".join(each.detach().numpy().tobytes() for each in tensors)


def in_books_numpy(seed):
    with book_numpy(np.random.RandomState(seed)):
        return np.dot(np.random.randn(3, 5), np.random.randn(5, 2)).tobytes()


#: What is done, and how often: what is quick meets other threads less often.
WORK = {judged: 2, fused: 2, in_the_dialect: 20, drawn: 20, drawn_by_torch: 20, in_books_numpy: 20}


def at_once(tasks):
    """What the tasks give, all begun at the same moment."""
    start = threading.Barrier(THREADS)

    def run(task):
        start.wait()
        return task()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, tasks))


@pytest.mark.parametrize("work", WORK)
def test_eight_threads_give_what_one_gives(work):
    expected = [work(seed) for seed in range(THREADS)]
    for _ in range(WORK[work]):
        assert at_once([partial(work, seed) for seed in range(THREADS)]) == expected


def test_different_work_at_a_time_gives_what_it_gives_alone():
    tasks = [partial([*WORK][i % len(WORK)], seed=i) for i in range(THREADS)]
    expected = [task() for task in tasks]
    for _ in range(3):
        assert at_once(tasks) == expected


def test_other_threads_keep_numpy_and_do_not_draw_from_the_blocks_stream():
    before = np.random.get_state()

    def elsewhere():
        np.random.randn(5)
        return np.zeros(1).dtype, np.eye(1).dtype, np.dot(np.ones(1), np.ones(1)).dtype

    with ThreadPoolExecutor(1) as pool, book_numpy(np.random.RandomState(0)):
        assert pool.submit(elsewhere).result() == (np.float64,) * 3
        assert np.zeros(1).dtype == np.float32
        first = np.random.randn(1)
    assert first == np.random.RandomState(0).randn(1).astype(np.float32)
    np.random.set_state(before)


def in_a_block():
    with book_numpy():
        raise KeyboardInterrupt


def many_classes():
    spiral(1, 257, generator=np.random.RandomState(0))


def not_finite():
    compare(Dense(2, 3), torch.full((4, 2), torch.nan))


class Failing(nn.Module):
    def forward(self, input):
        raise RuntimeError("a model of one's own")


def failing():
    compare(nn.Sequential(Dense(2, 3), Failing()), torch.ones(4, 2))


def wrong_width():
    book.Layer_Dense(2, 3).forward([[1, 2, 3]])


def wrong_input():
    fuse(nn.Sequential(Dense(2, 3), ReLU(), Softmax()))(torch.ones(4, 3))


RAISING = {
    in_a_block: KeyboardInterrupt,
    many_classes: ValueError,
    not_finite: ValueError,
    failing: ValueError,
    wrong_width: ValueError,
    wrong_input: ValueError,
}


def test_numpy_is_as_before_whatever_was_raised():
    before = [getattr(*place) for place in PATCHED]

    def outcome(task):
        try:
            return task()
        except BaseException as error:
            return type(error)

    tasks = [*RAISING, partial(drawn, 1), partial(in_books_numpy, 2)]
    expected = [*RAISING.values(), drawn(1), in_books_numpy(2)]
    for seed in range(5):
        order = random.Random(seed).sample(range(THREADS), THREADS)
        got = at_once([partial(outcome, tasks[i]) for i in order])
        assert got == [expected[i] for i in order]
        assert [getattr(*place) for place in PATCHED] == before
