"""Lets the wheel's Python backend stub, built for NumPy 1, exchange tensors with NumPy 2.

The stub's pybind11 reads the item size of a dtype where NumPy 1 kept it; NumPy 2 has zeros there. Left alone,
input tensors come with strides of 0, every item a copy of the first, and output tensors are 0 bytes long.

Inputs: the stub only makes C-contiguous arrays, so the function it makes them with, PyArray_NewFromDescr, is given
no strides and NumPy works them out. Only the table of C functions that old extensions ask for is replaced.
Outputs: they leave by DLPack, which does not ask for the item size.

`tools.triton` puts this file into the backend directory, beside the wheel's own files, and every stub imports it
before it makes a tensor.
"""

from __future__ import annotations

import ctypes
from typing import Any

import c_python_backend_utils
import numpy as np
import numpy.core.multiarray as multiarray
import numpy.typing as npt

TABLE_LENGTH = 300
"""Entries of NumPy's C API table that extensions for NumPy 1 know, rounded up."""
NEW_FROM_DESCR = 94
"""PyArray_NewFromDescr's place in that table, the same in NumPy 1 and 2."""

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


from_dlpack = c_python_backend_utils.Tensor.from_dlpack


def tensor(name: str, array: npt.NDArray[np.number[Any]]) -> object:
    """`pb_utils.Tensor(name, array)` for arrays of numbers and booleans."""
    return from_dlpack(name, Lent(np.ascontiguousarray(array)))


c_python_backend_utils.Tensor = tensor
