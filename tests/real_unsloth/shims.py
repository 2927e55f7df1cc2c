"""What Unsloth's GPU stack asks of a GPU while it is imported and run, answered on a CPU."""

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PROPERTIES = SimpleNamespace(
    name="none", total_memory=16 << 30, major=8, minor=0, multi_processor_count=2, warp_size=32, is_integrated=0
)

CPU = torch.device("cpu", 0)


class CudaOnCpu(TorchFunctionMode):
    """Tensors asked for on a GPU are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            named = [*args, *kwargs.values()][0]
            return CPU if _is_gpu(named) else func(*args, **kwargs)
        if "device" in kwargs and _is_gpu(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        return func(*(CPU if _is_gpu(value, bare=False) else value for value in args), **kwargs)


def _is_gpu(value: Any, bare: bool = True) -> bool:
    """``bare`` numbers are GPUs where a device is meant."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return value.split(":")[0] == "cuda" if isinstance(value, str) else bare and type(value) is int


class Autocast(torch.autocast):
    """A GPU's mixed precision is the CPU's."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def install(fast: bool) -> None:
    """Before ``import unsloth``: its GPU stack loads, and with ``fast`` its fast paths run, in this thread."""
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: PROPERTIES
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.mem_get_info = lambda *_: (PROPERTIES.total_memory, PROPERTIES.total_memory)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    torch.autocast = Autocast
    if fast:
        # The compiler cannot see through the mode.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        CudaOnCpu().__enter__()


def claim(bfloat16: bool) -> None:
    """After ``import unsloth``: whether the card computes in bfloat16; and bitsandbytes' kernels are there.

    Models that see are loaded without what prepares their images, which needs torchvision.
    """
    from unsloth.models import _utils, loader, vision

    _utils.SUPPORTS_BFLOAT16 = bfloat16
    loader.ALLOW_BITSANDBYTES = True
    vision._missing_torchvision_error = lambda *_: False
