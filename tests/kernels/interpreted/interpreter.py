"""Corrections of Triton's interpreter (3.6 to 3.9), and memory that reveals elements that were
never written.

As shipped, the interpreter represents bf16 by its 16-bit code and computes on the codes: sums,
products and maxima of bf16 are wrong, casts to bf16 truncate, casts to FP8 lose carries (127.99
becomes 64), and a fused multiply-add rounds twice. `install` replaces these: casts use torch, bf16
arithmetic is done in fp32 and rounded, a matrix product uses BLAS, an fma uses fp64 (exact product;
the sum is rounded to 53 bits before 24, which differs from one rounding only within 2^-29 ulp of a
tie).
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

_TORCH = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_CODES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY_CODES = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
Handle = interpreter.TensorHandle


def install() -> None:
    """Correct the interpreter of this process; TRITON_INTERPRET=1 must have been set before Triton
    was imported."""
    builder = interpreter.InterpreterBuilder
    _repair_casts(builder)
    _repair_arithmetic(builder)
    _repair_reductions(interpreter.ReduceScanOpInterface)
    _remember_types()
    _check_faster(type(interpreter.interpreter_semantic))
    interpreter._patch_attr = _patch_attr
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)


def poison(patch: pytest.MonkeyPatch) -> None:
    """Fill uninitialized memory with NaN, so that an element that a kernel omits is detected."""

    def poisoned(make: Any) -> Any:
        def filled(*arguments: Any, **options: Any) -> Tensor:
            x: Tensor = make(*arguments, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        patch.setattr(owner, name, poisoned(getattr(owner, name)))


def _patch_attr(owner: Any, name: str, member: Any, builder: Any, *scope: Any) -> None:
    """Let a function of the language compute with the interpreter; as shipped, but with one call
    between the two instead of three."""
    run = getattr(member, "__wrapped__", member)

    def interpreted(*arguments: Any, **options: Any) -> Any:
        options["_semantic"] = interpreter.interpreter_semantic
        return run(*arguments, **options)

    for place in scope:
        place.set_attr(owner, name, interpreted)
        return
    setattr(owner, name, interpreted)


class _Kept:
    """Replacement for the interpreter's cleanup after a launch: does nothing."""

    def restore(self) -> None:
        pass


def _patched_once(shipped: Callable[..., Any]) -> Callable[..., _Kept]:
    """Replace the functions of `triton.language` once for all kernels of this process.

    As shipped, every launch and every call of a device function searches all members of these
    modules again, which takes 40 % of the time of a kernel with small blocks.
    """
    patched, known = set[frozenset[str]](), set[str]()

    def patch_lang(function: Any) -> _Kept:
        if function.__module__ in known:
            return _Kept()
        known.add(function.__module__)
        modules = [
            value for value in function.__globals__.values() if isinstance(value, ModuleType)
        ]
        seen = frozenset(module.__name__ for module in modules if module in (tl, tl.core))
        if seen not in patched:
            shipped(function)
            patched.add(seen)
        return _Kept()

    return patch_lang


def _remember_types() -> None:
    """Compute what depends on a type once per type, which as shipped takes a third of the time of
    a kernel: the type of numpy, that of a block, that of a block with other elements, its shape in
    the language's form, and the form of a type in the interpreter, which is the type itself."""
    shipped = interpreter._get_np_dtype
    numpy_types: dict[str, np.dtype[Any]] = {}

    def numpy_type(type_: Any) -> Any:
        name = type_.scalar.name
        if name not in numpy_types:
            numpy_types[name] = shipped(type_)
        return numpy_types[name]

    interpreter._get_np_dtype = numpy_type
    block, shipped_with = tl.block_type, tl.block_type.with_element_ty

    def with_element_ty(self: Any, element: Any) -> Any:
        if element.is_ptr():
            return shipped_with(self, element)
        known = self.__dict__.setdefault("known", {})
        if element.name not in known:
            known[element.name] = shipped_with(self, element)
        return known[element.name]

    def initialize(self: Any, handle: Any, type_: Any) -> None:
        known = type_.__dict__.get("of_tensor")
        if known is None:
            sizes = type_.shape if type_.is_block() else ()
            shape = tl.tuple([tl.constexpr(size) for size in sizes])
            known = type_.__dict__["of_tensor"] = shape, tl.constexpr(math.prod(sizes))
        self.handle, self.type, self.dtype = handle, type_, type_.scalar
        self.shape, self.numel = known

    shipped_equal, shipped_block, blocks = tl.tuple.__eq__, block.__init__, dict[Any, Any]()

    def initialize_block(self: Any, element: Any, shape: Any) -> None:
        if element.is_ptr():
            shipped_block(self, element, shape)
            return
        sizes = tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        if (key := (element.name, sizes)) not in blocks:
            shipped_block(self, element, shape)
            form = tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(math.prod(sizes))
            blocks[key] = self.__dict__ | {"known": {}, "of_tensor": form}  # for all equal types
        self.__dict__.update(blocks[key])

    def equal(self: Any, other: Any) -> Any:
        return self.values == other if type(other) is list else shipped_equal(self, other)

    block.with_element_ty, block.to_ir = with_element_ty, lambda self, builder: self
    block.__init__, tl.tensor.__init__, tl.tuple.__eq__ = initialize_block, initialize, equal


_PLAIN = "fp32", "int1", "int32", "int64"
"""Types of which two equal ones are computed in that type, also when they are divided."""


def _check_faster(semantic: Any) -> None:
    """Leave out what takes half of the time of a kernel and changes nothing: the overflow of
    integers, which as shipped is computed but, without `debug`, not reported; conversions of two
    operands of one plain type and shape; the type of a result, again for the same types; and the
    search of a plain value for constants."""

    shipped_broadcast = semantic.broadcast_impl_value

    def broadcast(self: Any, left: Any, right: Any) -> Any:
        a, b = left.type, right.type
        if (
            a.is_block()
            and b.is_block()
            and (a.shape is b.shape or a.shape.values == b.shape.values)
        ):
            return left, right
        return shipped_broadcast(self, left, right)

    shipped_check, shipped_cast = semantic.binary_op_type_checking_impl, semantic.cast
    shipped_type, types = semantic.computation_type_impl, dict[Any, Any]()

    def check(self: Any, left: Any, right: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(left, tl.tensor) and isinstance(right, tl.tensor):
            a, b = left.type, right.type
            if left.dtype.name in _PLAIN and (a is b or a == b):
                return left, right
        return shipped_check(self, left, right, *arguments, **options)

    def computation_type(self: Any, a: Any, a_alone: bool, b: Any, b_alone: bool, div: bool) -> Any:
        key = a.name, a_alone, b.name, b_alone, div
        if key not in types:
            types[key] = shipped_type(self, a, a_alone, b, b_alone, div)
        return types[key]

    def cast(self: Any, x: Any, type_: Any, *arguments: Any, **options: Any) -> Any:
        if x.type.scalar is type_.scalar:
            return x
        return shipped_cast(self, x, type_, *arguments, **options)

    shipped_equal = tl.dtype.__eq__

    def equal(self: Any, other: Any) -> Any:
        return self.name == other.name if type(other) is tl.dtype else shipped_equal(self, other)

    shipped_unwrap = tl.core._unwrap_if_constexpr

    def unwrap(x: Any) -> Any:
        if type(x) is tl.constexpr:
            return x.value
        return x if type(x) in (tl.tensor, int, bool, str) else shipped_unwrap(x)

    tl.core._unwrap_if_constexpr = unwrap
    semantic.binary_op_sanitize_overflow_impl = lambda self, left, right, operation: None
    semantic.binary_op_type_checking_impl, semantic.cast = check, cast
    semantic.computation_type_impl, tl.dtype.__eq__ = computation_type, equal
    semantic.broadcast_impl_value = broadcast


def _is_float(type_: Any) -> bool:
    return type_.scalar.name in _TORCH


def _to_torch(handle: Any) -> Tensor:
    dtype = _TORCH[handle.dtype.scalar.name]
    data = np.ascontiguousarray(handle.data).view(_NUMPY_CODES[dtype.itemsize])
    return torch.from_numpy(data if data.flags.writeable else data.copy()).view(dtype)


def _cast(handle: Any, type_: Any) -> Any:
    x = _to_torch(handle).to(_TORCH[type_.scalar.name]).contiguous()
    data = x.view(_CODES[x.element_size()]).numpy().view(interpreter._get_np_dtype(type_.scalar))
    return Handle(data, type_.scalar)


def _fp32(handle: Any) -> Any:
    return handle if handle.dtype.scalar == tl.float32 else _cast(handle, tl.float32)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _repair_casts(builder: Any) -> None:
    shipped = builder.cast_impl

    def cast_impl(self: Any, source: Any, type_: Any) -> Any:
        if _is_float(source.dtype) and _is_float(type_):
            return _cast(source, type_)
        if _is_bf16(source):
            source = _fp32(source)
        if type_.scalar == tl.bfloat16:
            return _cast(Handle(source.data.astype(np.float32), tl.float32), type_)
        return shipped(self, source, type_)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = lambda self, source, type_, rounding: _cast(source, type_)


def _repair_arithmetic(builder: Any) -> None:
    binary, unary = builder.binary_op, builder.unary_op

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if not _is_bf16(left):
            return binary(self, left, right, operation)
        out = binary(self, _fp32(left), _fp32(right), operation)
        return out if out.data.dtype == np.bool_ else _cast(out, tl.bfloat16)

    def unary_op(self: Any, x: Any, operation: Any) -> Any:
        if not _is_bf16(x):
            return unary(self, x, operation)
        return _cast(unary(self, _fp32(x), operation), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        if a.dtype.scalar.is_floating():
            product = np.matmul(_fp32(a).data, _fp32(b).data)
        else:
            product = np.matmul(a.data, b.data, dtype=c.data.dtype)
        return Handle((product + c.data).astype(c.data.dtype), c.dtype.scalar)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64)
        return Handle((exact + z.data).astype(z.data.dtype), z.dtype.scalar)

    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.create_dot, builder.create_fma = create_dot, create_fma


def _repair_reductions(operations: Any) -> None:
    """Run reductions and scans of bf16 in fp32."""
    shipped = operations.apply

    def block(handle: Any) -> Any:
        shape = list(handle.data.shape)
        return tl.tensor(
            handle, tl.block_type(handle.dtype.scalar, shape) if shape else handle.dtype.scalar
        )

    def rounded(x: Any) -> Any:
        if x.dtype.scalar != tl.float32:
            return x  # the index of a maximum
        return block(_cast(Handle(np.asarray(x.handle.data), tl.float32), tl.bfloat16))

    def apply(self: Any, x: Any) -> Any:
        if isinstance(x, tuple) or x.dtype.scalar != tl.bfloat16:
            return shipped(self, x)
        out = shipped(self, block(_fp32(x.handle)))
        return tuple(map(rounded, out)) if isinstance(out, tuple) else rounded(out)

    operations.apply = apply
