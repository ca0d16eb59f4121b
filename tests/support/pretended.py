"""Tensors that say that they lie on a GPU, on machines without one: what would fail or wait on a real one shows.

Their numbers lie in the memory of the host, so that results can be compared with those of a CPU. As on a GPU, an
operation on tensors of both kinds is refused, and so is `numpy()`. What makes the host wait for the device is counted,
by the line of libprune that asks for it.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten


class Pretended(Tensor):
    """A tensor that says that it lies on a GPU; `host` holds its numbers."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> "Pretended":
        own = Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )
        own.host = host
        return own

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def __repr__(self) -> str:
        return f"Pretended({self.host})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor on a GPU to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _require_one_device(func, args, kwargs)
        if func in _WAITING or (func is aten.index.Tensor and _by_mask(args[1])):
            _wait(str(func))
        hosts, named = tree_map(_host, args), tree_map(_host, kwargs)
        if func is aten.mm.dtype:
            return cls(hosts[0].float() @ hosts[1].float())
        found = tree_map(lambda x: cls(x) if type(x) is Tensor else x, func(*hosts, **named))
        return return_and_correct_aliasing(func, args, kwargs, found)


_WAITING = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.bincount.default, aten.equal.default),
    *(aten.masked_select.default, aten.repeat_interleave.Tensor),
}
"""Operations whose result, or its size, the host has to know."""
_ACROSS = {
    *(aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default),
    *(aten._index_put_impl_.default, aten._unsafe_index_put.default, aten.set_.source_Tensor),
}
"""Operations that take tensors of several devices."""
waited: Counter[str] = Counter()
"""How often the host has waited, by the line that asked for it."""


def _host(x: Any) -> Any:
    return x.host if isinstance(x, Pretended) else x


def _by_mask(indices: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in indices)


def _require_one_device(func: Any, args: Any, kwargs: Any) -> None:
    tensors: list[Tensor] = []
    tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    if func not in _ACROSS and any(x.ndim and not isinstance(x, Pretended) for x in tensors):
        raise RuntimeError(f"{func} on tensors of the host and of a GPU")


def _wait(what: str) -> None:
    frame: Any = sys._getframe(1)
    while frame and "/libprune/" not in frame.f_code.co_filename:
        frame = frame.f_back
    place = "elsewhere"
    if frame:
        place = f"{frame.f_code.co_filename.rpartition('/libprune/')[2]}:{frame.f_code.co_name}"
    waited[f"{place} {what}"] += 1


class _Pretending(TorchFunctionMode):
    """Moves tensors to the pretended device and back, and makes new ones there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in {"to", "cpu", "cuda"} and args and isinstance(args[0], Tensor):
            return _moved(func, name, args, kwargs)
        if func is Tensor.backward:
            with self:  # for what hooks do
                loss = args[0]
                return _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
        if name == "tolist" and isinstance(args[0], Pretended):
            _wait("tolist")
            return args[0].host.tolist()
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            found = func(*args, **{**kwargs, "device": CPU})
            return found if isinstance(found, Pretended) else Pretended(found)
        return func(*args, **kwargs)


def _moved(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    x, target = args[0], {"cpu": CPU, "cuda": GPU}.get(name)
    rest = []
    for one in args[1:]:
        if isinstance(one, Tensor):
            target = one.device
            rest.append(one.dtype)
        elif isinstance(one, str | torch.device):
            target = torch.device(one)
        else:
            rest.append(one)
    if kwargs.get("device") is not None:
        target = torch.device(kwargs["device"])
    kwargs.pop("device", None)
    if name == "to" and (rest or kwargs):
        x = func(x, *rest, **kwargs)
    if target is None or target.type == x.device.type:
        return x
    if target.type == "cpu":
        _wait("to the host")
        return x.host.detach().clone()
    if x.ndim and not kwargs.get("non_blocking"):
        _wait("to the device")
    return Pretended(x.detach())


@contextmanager
def pretending() -> Iterator[Counter[str]]:
    """Inside the context the device `cuda:0` can be used; how often the host waits for it is counted."""
    waited.clear()
    with _Pretending():
        yield waited


def on_gpu(model: nn.Module) -> nn.Module:
    """A model whose parameters and buffers say that they lie on a GPU; those that are tied stay so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                new = nn.Parameter(Pretended(parameter.data), parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), new)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = Pretended(buffer)
    return model
