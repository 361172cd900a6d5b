"""A second device without a GPU: torch's spare device type, with its numbers in the CPU's memory.

As a plugin (`pytest -p second_device`) it registers the device, for the whole process, before the
tests ask which devices there are; test_second_device.py starts that process. The CPU computes
everything: nothing here speaks of a GPU's arithmetic.
"""

import ctypes

import torch
from torch.utils import dlpack
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "twin"
_LIBRARY = torch.library.Library("_", "IMPL")
ELSEWHERE = 12  # the device type of an extension in DLPack, which torch reads as its spare one
# What takes tensors of two devices: copies, and places in an index, as on a GPU.
MIXING = ("aten::copy_", "aten::_copy_from", "aten::index", "aten::_index_put_impl_")

_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def on_twin(tensor):
    """The memory of a CPU tensor as a tensor of the second device."""
    capsule = dlpack.to_dlpack(tensor.detach())
    place = _address(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(place).value = ELSEWHERE
    return dlpack.from_dlpack(capsule)


def on_cpu(tensor):
    """The memory of a tensor of the second device as a CPU tensor."""
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in pairs)
    memory = (ctypes.c_byte * (count * tensor.element_size())).from_address(tensor.data_ptr())
    memory.owner = tensor  # whoever holds the memory holds the tensor
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def compute(operation, *args, **kwargs):
    """Any operation, on the CPU; its results go back to where they belong."""
    given = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    numbers = [each for each in given if each.ndim and not each.is_meta]
    name = operation._schema.name
    if len({each.device for each in numbers}) > 1 and not name.startswith(MIXING):
        raise RuntimeError(
            f"{operation} expects all tensors to be on the same device, got "
            f"{', '.join(str(each.device) for each in numbers)}"
        )
    pairs = {}

    def leave(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, torch.Tensor):
            return value
        moved = on_cpu(value) if value.device.type == NAME else value
        pairs[id(moved)] = value, moved
        return moved

    def come_back(value):
        if not isinstance(value, torch.Tensor):
            return value
        return pairs[id(value)][0] if id(value) in pairs else on_twin(value)

    with torch._C.DisableTorchFunctionSubclass():  # parameters without a shape yet ask for this
        args, kwargs = tree_map(leave, (args, kwargs))
        if name.startswith("aten::_copy_from"):  # the one with no kernel on the CPU
            result = args[1].resize_(args[0].size()).copy_(args[0])
        else:
            result = operation(*args, **kwargs)
        for value, moved in pairs.values():
            if value.size() != moved.size():  # an empty `out`, which got other memory
                value.data = on_twin(moved)
    return tree_map(come_back, result)


_deepcopy = torch.Tensor.__deepcopy__


def deepcopy(tensor, memo):
    """torch's way copies a storage, for which a backend in Python has no memory to give."""
    if tensor.device.type != NAME:
        return _deepcopy(tensor, memo)
    return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))


def pytest_load_initial_conftests():
    torch.Tensor.__deepcopy__ = deepcopy
    _setup_privateuseone_for_python_backend(NAME)
    _LIBRARY.fallback(compute, "PrivateUse1")
