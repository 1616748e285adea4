"""What `memory.preset` sets: the members of the family by name.

A preset sets only the keys that make the member. Widths, heads and starts stay as they are. It is applied before the
other keys of its file or command line, so a key beside it wins. A preset on the command line wins over the file.
"""

from __future__ import annotations

from typing import Any

_OMEGA = {"window": 16, "omega_gates": "pair"}
_ONLINE = {"window": 1, "omega_gates": "none"}
_NEWTON_SCHULZ = {"momentum": True, "ns_steps": 5}
_MOMENTUM = {"momentum": True, "ns_steps": 0, "ns_period": 1}
_PLAIN = {"momentum": False, "ns_steps": 0, "ns_period": 1}
# Memories that write raw gradients diverge without the output norm. With Newton-Schulz the paper's form needs none.
_DEEP = {"network": "mlp", "norm": "layer", "residual": True}
_ATLAS = {"network": "mlp", "norm": "none", "residual": True, "eta_per_token": 0.005}
# With the step of a plain memory a gated one's outer gradients explode: its hidden width is a product of two written
# layers. With a residual it recalls nothing at its start (docs/results/start_recall.md).
_GATED = {"network": "gated_mlp", "norm": "none", "residual": False, "eta_per_token": 0.002}
_LINEAR = {"network": "linear", "norm": "none", "residual": True}
_POLYNOMIAL = {"kernel": "lifted", "feature_map": "hadamard", "degree": 2}
_IDENTITY = {"kernel": "lifted", "feature_map": "identity"}
_EXPONENTIAL = {"kernel": "exponential", "feature_map": "identity"}
_L2 = {"loss": "l2", "retention": True, "step_in_momentum": False}
_DOT = {**_L2, "loss": "dot"}
_KEEPS_ALL = {**_L2, "retention": False}

PRESETS: dict[str, dict[str, Any]] = {
    "atlas": {**_ATLAS, **_L2, **_OMEGA, **_NEWTON_SCHULZ, **_POLYNOMIAL},
    "atlas++": {**_GATED, **_L2, **_OMEGA, **_NEWTON_SCHULZ, **_POLYNOMIAL},
    "omeganet": {**_DEEP, **_L2, **_OMEGA, **_PLAIN, **_POLYNOMIAL},
    "titans": {**_DEEP, **_L2, **_ONLINE, **_MOMENTUM, **_IDENTITY, "step_in_momentum": True},
    "ttt": {**_DEEP, **_KEEPS_ALL, **_ONLINE, **_PLAIN, **_IDENTITY},
    # Steps lie between 0 and 1: with keys of length 1, a step of 1 removes the whole error.
    "delta": {**_LINEAR, **_KEEPS_ALL, **_ONLINE, **_PLAIN, **_IDENTITY, "chunk": 1, "eta_start": 0.1},
    "dla": {**_DEEP, **_DOT, **_ONLINE, **_PLAIN, **_POLYNOMIAL},
    "swla": {**_LINEAR, **_DOT, **_OMEGA, **_PLAIN, **_POLYNOMIAL},
    "deep_transformer": {**_DEEP, **_DOT, **_ONLINE, **_PLAIN, **_EXPONENTIAL},
    "swdt": {**_DEEP, **_DOT, **_OMEGA, **_PLAIN, **_EXPONENTIAL},
    "dot": {**_DEEP, **_L2, **_OMEGA, **_PLAIN, **_EXPONENTIAL},
}
