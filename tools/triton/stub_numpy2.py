"""Lets the wheel's Python backend stub, built for NumPy 1, exchange tensors with NumPy 2.

The stub's pybind11 reads the item size of a dtype where NumPy 1 kept it; NumPy 2 has zeros there. Left alone,
input tensors come with strides of 0, every item a copy of the first, and output tensors are 0 bytes long.

Inputs: the stub only makes C-contiguous arrays, so the function it makes them with, PyArray_NewFromDescr, is given
no strides and NumPy works them out. Only the table of C functions that old extensions ask for is replaced.
Outputs of numbers leave by DLPack, which does not ask for the item size. DLPack has no strings. Those leave by the
stub's own constructor: it asks `serialize_byte_tensor` for their bytes, and takes the item size of that array for
their number. So the array is one item of a dtype of its own, and the place of the size holds the number of bytes.

`tools.triton` puts this file into the backend directory, beside the wheel's own files, and every stub imports it
before it makes a tensor.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from typing import Any

import c_python_backend_utils
import numpy as np
import numpy.core.multiarray as multiarray
import numpy.typing as npt

TABLE_LENGTH = 300
"""Entries of NumPy's C API table that extensions for NumPy 1 know, rounded up."""
NEW_FROM_DESCR = 94
"""PyArray_NewFromDescr's place in that table, the same in NumPy 1 and 2."""

ITEM_SIZE = 32
"""Byte of a dtype where NumPy 1 keeps the size of an item, and NumPy 2 flags, which are 0 of plain bytes."""

address = ctypes.c_void_p
capsule_get = ctypes.pythonapi.PyCapsule_GetPointer
capsule_get.restype, capsule_get.argtypes = address, [ctypes.py_object, ctypes.c_char_p]
capsule_new = ctypes.pythonapi.PyCapsule_New
capsule_new.restype, capsule_new.argtypes = ctypes.py_object, [address, ctypes.c_char_p, address]
capsule_set_destructor = ctypes.pythonapi.PyCapsule_SetDestructor
capsule_set_destructor.argtypes = [ctypes.py_object, address]

# PyObject *(subtype, descr, nd, dims, strides, data, flags, obj)
Constructor = ctypes.PYFUNCTYPE(
    address, address, address, ctypes.c_int, address, address, address, ctypes.c_int, address
)

numpy_table = (address * TABLE_LENGTH).from_address(capsule_get(multiarray._ARRAY_API, None))
table = (address * TABLE_LENGTH).from_buffer_copy(numpy_table)
new_from_descr = Constructor(numpy_table[NEW_FROM_DESCR] or 0)


def new_contiguous(
    subtype: int, descr: int, nd: int, dims: int, _strides: int, data: int, flags: int, obj: int
) -> int:
    """PyArray_NewFromDescr without the caller's strides."""
    made: int = new_from_descr(subtype, descr, nd, dims, None, data, flags, obj)
    return made


constructor = Constructor(new_contiguous)
table[NEW_FROM_DESCR] = ctypes.cast(constructor, address).value
multiarray._ARRAY_API = capsule_new(ctypes.addressof(table), None, None)


class Lent:
    """An array that the stub takes over by DLPack."""

    def __init__(self, array: npt.NDArray[np.number[Any]]) -> None:
        self._array = array

    def __dlpack__(self, stream: object = None) -> object:
        """A capsule without NumPy's destructor: the stub renames used capsules in a way that NumPy rejects."""
        capsule = self._array.__dlpack__(stream=stream)
        capsule_set_destructor(capsule, None)
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """The CPU."""
        return self._array.__dlpack_device__()


class Current(threading.local):
    """The string tensor that a thread is making: its bytes, and where the stub looks for their number."""

    array: npt.NDArray[Any] | None = None
    size = ctypes.c_uint64()


current = Current()


def serialize_byte_tensor(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Strings end to end, each after its length in 4 bytes, as one item that the stub takes for so many bytes."""
    items = [item if isinstance(item, bytes) else str(item).encode() for item in array.reshape(-1).tolist()]
    data = b"".join(struct.pack("<I", len(item)) + item for item in items)
    whole = np.frombuffer(data or b"\0", np.dtype((np.void, max(1, len(data)))))
    current.array, current.size = whole, ctypes.c_uint64.from_address(id(whole.dtype) + ITEM_SIZE)
    current.size.value = len(data)
    return whole


from_dlpack = c_python_backend_utils.Tensor.from_dlpack
from_strings = c_python_backend_utils.Tensor


def tensor(name: str, array: npt.NDArray[Any]) -> object:
    """`pb_utils.Tensor(name, array)`; strings are bytes or str in an array of objects."""
    if array.dtype != object:
        return from_dlpack(name, Lent(np.ascontiguousarray(array)))
    try:
        return from_strings(name, array)
    finally:
        current.size.value = 0  # NumPy's own flags again
        current.array = None


sys.modules["triton_python_backend_utils"].serialize_byte_tensor = serialize_byte_tensor  # type: ignore[attr-defined]
c_python_backend_utils.Tensor = tensor
