import nnfs
import numpy as np
import pytest
import torch

from torchnnfs import Dense, book_numpy
from torchnnfs.checks import check_generator


def patched():
    return np.dot, np.zeros, np.eye, np.random.randn


def test_book_numpy_is_nnfs_init_and_is_undone():
    before, state = patched(), np.random.get_state()
    with book_numpy():
        assert not set(patched()) & set(before)
        assert np.zeros(2).dtype == np.eye(2).dtype == np.float32
        assert all(hasattr(each, "__name__") for each in patched())  # numpy.ma wants it
        inside = np.random.randn(3)
        assert inside.dtype == np.float32
        a = np.array([[1e8, 1.0, -1e8]], dtype=np.float32)
        assert np.dot(a, np.ones((3, 1), np.float32)) == 1  # float64 inside, float32 outside
    assert patched() == before
    for now, then in zip(np.random.get_state(), state, strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(inside, np.random.RandomState(0).randn(3).astype(np.float32))


def test_book_numpy_is_undone_after_an_exception():
    before = patched()
    with pytest.raises(ZeroDivisionError), book_numpy():
        1 / 0  # noqa: B018
    assert patched() == before


def test_book_numpy_nests():
    before = patched()
    with book_numpy():
        outer = patched()
        first = np.random.randn(1)
        with book_numpy():
            assert np.random.randn(1) == first
        assert patched() == outer
        assert np.random.randn(1) != first  # the outer stream goes on where it was
    assert patched() == before


def test_book_numpy_draws_from_a_given_stream():
    stream = np.random.RandomState(5)
    before = np.random.get_state()[1].copy()
    with book_numpy(stream):
        drawn = np.random.randn(4)
    assert (drawn == np.random.RandomState(5).randn(4).astype(np.float32)).all()
    assert stream.randn() == np.random.RandomState(5).randn(5)[-1]
    assert (np.random.get_state()[1] == before).all()


def test_the_global_stream_may_be_of_another_kind():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        with book_numpy(np.random.RandomState(0)):
            assert np.random.randn(1) == np.float32(np.random.RandomState(0).randn())
        assert np.random.rand() == np.random.RandomState(np.random.PCG64(1)).rand()
    finally:
        np.random.set_bit_generator(before)


def test_book_numpy_within_nnfs_init():
    before, state = patched(), np.random.get_state()
    try:
        nnfs.init()
        theirs = patched()
        with book_numpy():
            pass
        assert patched() == theirs
        assert Dense(2, 3, generator=np.random.RandomState(0)).weight.dtype == torch.float32
    finally:
        np.dot, np.zeros, np.eye, np.random.randn = before
        np.random.set_state(state)


def test_book_numpy_wants_a_randomstate():
    with (
        pytest.raises(TypeError, match=r"RandomState or None, got Generator"),
        book_numpy(np.random.default_rng(0)),
    ):
        pass


def test_generator_of_another_kind_of_device():
    with pytest.raises(ValueError, match=r"expects a torch.Generator on cuda, got one on cpu"):
        check_generator("Dense", torch.Generator(), torch.device("cuda"))
    check_generator("Dense", np.random.RandomState(0), torch.device("cuda"))
