"""Lets the wheel's Python backend stub, built for NumPy 1, make its input tensors under NumPy 2.

The stub's pybind11 reads the item size of a dtype where NumPy 1 kept it. NumPy 2 has zeros there, so arrays came
out with strides of 0: every item a copy of the first. The stub only makes C-contiguous arrays, so the function
it makes them with, PyArray_NewFromDescr, is given no strides here and NumPy works them out. Only the table of C
functions that old extensions ask for is replaced; NumPy and newer extensions keep theirs.

`tools.triton` puts this file into the backend directory, beside the wheel's own files, and has every stub import
it. Output tensors go by DLPack, which never asks for the item size.
"""

from __future__ import annotations

import ctypes

import numpy.core.multiarray as multiarray

TABLE_LENGTH = 300
"""Entries of NumPy's C API table that extensions for NumPy 1 know, rounded up."""
NEW_FROM_DESCR = 94
"""PyArray_NewFromDescr's place in that table, the same in NumPy 1 and 2."""

address = ctypes.c_void_p
capsule_get = ctypes.pythonapi.PyCapsule_GetPointer
capsule_get.restype, capsule_get.argtypes = address, [ctypes.py_object, ctypes.c_char_p]
capsule_new = ctypes.pythonapi.PyCapsule_New
capsule_new.restype, capsule_new.argtypes = ctypes.py_object, [address, ctypes.c_char_p, address]

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
