"""What `impl="triton"` covers, told without importing Triton."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from atlas_kernels.rule import MemoryRule

WIDTHS = range(16, 129, 16)  # of D and V; padded to powers of two
# With ns_steps > 0: D and V (and with float32 products), F.
NARROW, NARROW_FLOAT32, WIDE = 128, 64, 512
CHUNK = 64
# A chunk's tokens and their halo, held on chip at once; and how many with float32 products, of D and V up to 64.
SOURCES, SOURCES_FLOAT32 = 128, 64
# Shared memory that a block takes at most, with D and V up to 64 and up to 128.
SHARED, SHARED_WIDE = 120 << 10, 208 << 10


def refusal(rule: MemoryRule, q: Tensor, v: Tensor, weights: tuple[Tensor, ...], products: torch.dtype) -> str | None:
    """Why the kernels do not run this call, in words that follow "impl='triton'"; None if they do.

    q [B, T, H, D], v [B, T, H, V], weights as in `omega_memory`; products: bfloat16, float16 or float32.
    """
    if rule.dual or rule.memory == "linear" and not rule.ns_steps:
        return f"covers memory='mlp' and 'gated_mlp' of kernel='lifted', not {rule.memory!r} of {rule.kernel!r}"
    if rule.read != "token":
        return f"reads after a token's own write, not with read={rule.read!r}, whose large products torch does as fast"
    if weights[0].dtype == torch.float64:
        return "computes in float32, and the weights are float64"
    if q.device.type == "meta":
        pass  # nothing is computed: what would be launched is counted
    elif not q.is_cuda:
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"needs a CUDA GPU, and q lies on {q.device.type}"
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"needs a GPU of compute capability 8.0 or more, and this one has {major}.{minor}"
    key, value = q.shape[-1], v.shape[-1]
    if rule.ns_steps:
        hidden = value if rule.memory == "linear" else weights[0].shape[-1]
        return _orthogonal_refusal(key, value, hidden, products)
    needed, given = SHARED if max(key, value) <= 64 else SHARED_WIDE, _shared_memory(q)
    return size_refusal(rule, key, value, weights[0].shape[-1], products) or (
        f"needs {needed >> 10} KiB of shared memory a block, and this GPU has {given >> 10}" if given < needed else None
    )


def _shared_memory(q: Tensor) -> int:
    if not q.is_cuda:
        return SHARED_WIDE
    properties = torch.cuda.get_device_properties(q.device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it


def _orthogonal_refusal(key: int, value: int, hidden: int, products: torch.dtype) -> str | None:
    most = NARROW_FLOAT32 if products == torch.float32 else NARROW
    if max(key, value) <= most and hidden <= WIDE:
        return None
    return (
        f"with ns_steps > 0 covers D and V up to {NARROW} (with float32 products up to {NARROW_FLOAT32}) and F up to "
        f"{WIDE}, not D={key}, V={value}, F={hidden} with {str(products).removeprefix('torch.')} products"
    )


def size_refusal(rule: MemoryRule, key: int, value: int, hidden: int, products: torch.dtype) -> str | None:
    """Why no kernel that goes through whole segments runs these sizes, as `refusal`."""
    if key not in WIDTHS or value not in WIDTHS:
        return f"covers D and V that are multiples of 16 up to {WIDTHS[-1]}, not D={key}, V={value}"
    if hidden % 16:
        return f"covers F that is a multiple of 16, not F={hidden}"
    sources = rule.chunk + rule.window - 1
    if rule.chunk > CHUNK or sources > SOURCES:
        return (
            f"covers chunk up to {CHUNK} and chunk + window - 1 up to {SOURCES}, not chunk={rule.chunk}, "
            f"window={rule.window}"
        )
    if products == torch.float32 and (sources > SOURCES_FLOAT32 or max(key, value) > 64):
        return (
            f"with float32 products covers chunk + window - 1 up to {SOURCES_FLOAT32}, D and V up to 64, not "
            f"chunk={rule.chunk}, window={rule.window}, D={key}, V={value} (bfloat16 products go further)"
        )
    return None
