"""CUDA tensors without memory or GPU: shapes, types and devices are computed, and nothing else.

What runs on them takes the paths of a GPU (`is_cuda` is true). A tensor that was left on the CPU, and a shape or a decision
that depends on numbers, end in an error.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dpt.config.sections import ModelConfig
from dpt.models.dit import DiT

CUDA = torch.device("cuda", 0)
_CPU_INDEX, _CUDA_INDEX, _LENGTH = 0, 1, 22
"""Of devices' types in PyTorch's table of device guards."""


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Within, tensors made on "cuda" are fake, without gradients; no real tensor may take part."""
    with _device_guard(), FakeTensorMode(allow_non_fake_inputs=False) as mode, torch.no_grad():
        yield mode


@contextmanager
def _device_guard() -> Iterator[None]:
    """A guard for CUDA devices: PyTorch built for CPUs has none, and some calls ask for it. The CPU's will do: it does
    nothing."""
    if torch.backends.cuda.is_built():  # FakeTensorMode cares for it where there is no GPU
        yield
        return
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * _LENGTH).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        pytest.skip("this PyTorch, without CUDA, does not show its table of device guards")
    before = guards[_CUDA_INDEX]
    guards[_CUDA_INDEX] = guards[_CPU_INDEX]
    try:
        yield
    finally:
        guards[_CUDA_INDEX] = before


def fake_network(mode: FakeTensorMode, config: ModelConfig, dtype: torch.dtype) -> DiT:
    """The network, as large as it may be, with fake weights on the GPU."""
    with unset_fake_temporarily():
        with torch.device("meta"):
            network = DiT(config)
        put_on_gpu(mode, network, dtype)
    return network


def put_on_gpu(mode: FakeTensorMode, whole: nn.Module, dtype: torch.dtype) -> None:
    """Fake weights on the GPU in place of a module's own."""
    with unset_fake_temporarily():
        for module in whole.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(_on_gpu(mode, weight, dtype), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _on_gpu(mode, buffer, dtype)


def _on_gpu(mode: FakeTensorMode, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    meta = tensor.detach().to("meta", dtype if tensor.is_floating_point() else tensor.dtype)
    return mode.fake_tensor_converter.from_meta_and_device(mode, meta, CUDA)
