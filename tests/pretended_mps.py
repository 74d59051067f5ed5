"""A pretended Apple GPU: tensors that say `device.type == "mps"`, are computed on the CPU, and refuse float64 as MPS does.

    with pretended_mps():
        there = tensor.to("mps")

What runs on the device is decided as PyTorch decides it: by the `device` argument, or by the tensors. Numbers of another
device are refused, but for 0-d tensors, which PyTorch takes from the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps", 0)


class There(Tensor):
    """A tensor on the pretended device; `inner` holds its values on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        shape, strides = inner.size(), inner.stride()
        there = torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=inner.dtype, device=MPS)
        there.inner = inner
        return there  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    copying = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
    on_device = any(isinstance(t, There) for t in given)
    if on_device and not copying:
        strangers = [t for t in given if not isinstance(t, There) and t.ndim]
        assert not strangers, f"{func} mixes MPS and CPU tensors: {[tuple(t.shape) for t in strangers]}"
    wanted = kwargs.get("device")
    if wanted is not None:
        on_device = torch.device(wanted).type == "mps"
        kwargs = kwargs | {"device": torch.device("cpu")}
    outer = {id(t.inner): t for t in given if isinstance(t, There)}
    plain_args, plain_kwargs = tree_map(lambda t: t.inner if isinstance(t, There) else t, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func.overloadpacket is torch.ops.aten.copy_:
        return args[0]

    def wrapped(out: Any) -> Any:
        if not isinstance(out, Tensor) or not on_device:
            return out
        return outer[id(out)] if id(out) in outer else There(out)  # in place: the same object

    return tree_map(wrapped, result)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


_ON_VALUES = {getattr(Tensor, name) for name in ("__getitem__", "__setitem__", "__int__", "__float__", "__bool__", "item")}


class _Methods(TorchFunctionMode):
    """What would look for a real device before anything else: `Tensor.to`, indexing, conversion to numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **(kwargs or {}))
            if device is not None and device.type == "mps":
                values = args[0]
                if isinstance(values, There):
                    return values if dtype is None else values.to(dtype)
                return There(values.to(dtype or values.dtype, copy=True))
        if func in _ON_VALUES and isinstance(args[0], There):
            found = func(*(a.inner if isinstance(a, There) else a for a in args))
            return There(found) if isinstance(found, Tensor) else found  # a view of the same memory
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended_mps() -> Iterator[None]:
    """Factories with `device="mps"` and `Tensor.to("mps")` give pretended tensors."""
    with _Methods(), _Operations():
        yield
