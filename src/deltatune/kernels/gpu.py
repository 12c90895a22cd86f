"""Which form of an operation runs on a GPU. A choice of the user's, until measurements make it.

"plain"    the products and sums of the method, as written in its file: the default
"fused"    layer and update in one operation of torch's products (`deltatune.kernels.fused_linear`)
"triton"   the same with Triton's kernels (`triton_linear`, `triton_rows`); as "fused" what they do not fit

`gpu.backend = "triton"` for the process, `with gpu.using("triton"):` for a block. benchmarks/gpu.py compares the three.
On a CPU the choice has no effect: `deltatune.kernels.low_rank` was measured there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deltatune.errors import ConfigError

BACKENDS = ("plain", "fused", "triton")
backend = "plain"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def using(name: str) -> Iterator[None]:
    """That backend for a block, in all threads.

    Raises:
        ConfigError: There is none of that name, or it is "triton" and triton is not installed.
    """
    global backend
    if name not in BACKENDS:
        raise ConfigError(f"gpu.using: {name!r} is no backend, expected one of {BACKENDS}", field="backend", found=name)
    if name == "triton" and not installed():
        raise ConfigError(
            "gpu.using: triton is not installed; pip install 'deltatune[gpu]', or use 'fused'",
            field="backend",
            found=name,
            expected="fused",
            hint="pip install 'deltatune[gpu]'",
        )
    before, backend = backend, name
    try:
        yield
    finally:
        backend = before


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs kernels on a CPU, number by number, as it does under TRITON_INTERPRET=1."""
    if not installed():
        return False
    from triton import knobs  # pyright: ignore[reportMissingImports]

    return bool(knobs.runtime.interpret)


def on_gpu(x: Tensor) -> bool:
    """Whether an operation on x may be another than the plain one."""
    if backend == "plain" or x.dtype not in _DTYPES:
        return False
    # the interpreter multiplies the bits of bfloat16 as if they were integers
    return x.is_cuda or (backend == "triton" and x.dtype != torch.bfloat16 and interpreted())


def by_triton(x: Tensor) -> bool:
    return backend == "triton" and on_gpu(x) and installed()
