"""`omega_memory`, the one function to call. It checks its arguments, chooses an implementation and says which."""

from __future__ import annotations

import importlib
import logging
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from .chunked import TORCH, Kernels, omega_memory_chunked, omega_memory_packed
from .dual import DualState, initial_dual_state, omega_memory_dual
from .leaving import with_unread
from .memories import MatrixView, memory_of, oriented
from .packing import documents, of_rows, row_of
from .reference import omega_memory_reference
from .rule import Gates, Inputs, MemoryRule, MemoryState, initial_state
from .shards import in_shards

logger = logging.getLogger("atlas_kernels")

State = MemoryState | DualState

IMPLEMENTATIONS = ("reference", "chunked", "triton")

_announced: set[str] = set()


def omega_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    weights: tuple[Tensor, ...],
    rule: MemoryRule,
    state: State | None = None,
    residual: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
    positions: Tensor | None = None,
    products: torch.dtype | None = None,
) -> tuple[Tensor, State]:
    """Write every token into the memory, then read it with the token's query (paper Eqs 9, 32, 33).

    Sizes: B sequences, T tokens, H heads, D the lifted key, V the value, F the memory's hidden width.

    - `q`, `k`: [B, T, H, D], lifted by the feature map; plain for the exponential kernels. `v`: [B, T, H, V].
    - `gates`: step, retention, momentum and window gates; see `Gates`.
    - `weights`: the start weights of each head, shared by all sequences. linear: [H, V, D]. mlp: [H, V, F], [H, F, D].
      gated_mlp: [H, V, F] and twice [H, F, D]. Not read when `state` is given.
    - `rule`: what the memory is and how it learns; see `MemoryRule`.
    - `state`: where an earlier call stopped. op(prefix), then op(suffix, state), equals op(whole) at any cut.
    - `residual`: what a deep memory adds to its output, for queries and for keys, [B, T, H, V] each. None: the lifted
      input itself, which needs D = V; nothing where the rule has residual=False.
    - `impl`: "reference" (token by token), "chunked" (matrix products), "triton" (the same in GPU kernels) or "auto"
      (triton where it covers the call, else chunked).
    - `positions`: [B, T] int64, each token's position in its own document, where documents are packed. At 0 a document
      begins with the start weights; `weights` is then read even with a state, as with `rule.shard`. None: one document.
    - `products`: the dtype to which the GPU kernels round what they multiply: bfloat16, float16 or float32. None: the
      dtype of `q`. A bfloat16 model whose q was normalised in float32 says bfloat16.

    Returns y, [B, T, H, V] in the dtype of `q`, and the state after the last token. Everything inside is float32, or
    float64 where the weights are. Differentiable once in every tensor, the state's included.
    Raises ValueError that names the argument, what was given and what to do.
    """
    given = Inputs(q, k, v, gates, residual)
    _check(impl, rule, weights, given, state, positions)
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    cast = lambda t: t.to(dtype)  # noqa: E731  bfloat16 activations: the inner loop sums many small steps
    start, inputs = tuple(map(cast, weights)), given.map(cast)
    if state is None:
        initial = initial_dual_state if rule.dual else initial_state
        state = initial(rule, start, k, v, residuals=residual is not None, source_gates=not gates.pair)
    else:
        state = state.map(cast)
    if positions is None and isinstance(state.position, Tensor):
        positions = state.position[:, None] + torch.arange(q.shape[1], device=q.device)
    products = _operands(q.dtype if products is None else products)
    impl = _choose(impl, rule, q, v, weights, products)
    kernels = _gpu_kernels(rule, weights, products) if impl == "triton" else TORCH
    after: State
    if isinstance(state, DualState):
        y, after = omega_memory_dual(rule, state, inputs)
    elif positions is None:
        scan = partial(omega_memory_chunked, kernels=kernels)
        if impl == "reference":
            y, after = omega_memory_reference(rule, state, inputs, start)
        elif rule.shard:
            y, after = in_shards(scan, rule, state, inputs, start)
        else:
            y, after = scan(rule, state, inputs)
    else:
        packed = _by_document if impl == "reference" else partial(omega_memory_packed, kernels=kernels)
        y, after = packed(rule, state, inputs, start, positions)
    y = y.to(q.dtype)
    return with_unread(y, given) if rule.read == "chunk" else y, after


def _by_document(
    rule: MemoryRule, state: MemoryState, inputs: Inputs, start: tuple[Tensor, ...], positions: Tensor
) -> tuple[Tensor, MemoryState[Tensor]]:
    """Packed documents with the reference: each one on its own. Arguments as in `omega_memory_packed`."""
    initial = partial(initial_state, residuals=inputs.residual is not None, source_gates=not inputs.gates.pair)
    rows: list[list[Tensor]] = [[] for _ in range(len(positions))]
    after = [row_of(state, row, first) for row, first in enumerate(positions[:, 0].tolist())]
    for row, tokens, begins in documents(positions):
        own = inputs.map(lambda t: t[row : row + 1, tokens])  # noqa: B023  used before the next turn
        before = initial(rule, start, own.k, own.v) if begins else after[row]
        y, after[row] = omega_memory_reference(rule, before, own, start)
        rows[row].append(y)
    return torch.cat([torch.cat(parts, 1) for parts in rows]), of_rows(after)


def read_memory(
    q: Tensor, weights: tuple[Tensor, ...], rule: MemoryRule, state: State | None = None, residual: Tensor | None = None
) -> Tensor:
    """What the memory as it stands answers to q [B, T, H, D], lifted as for `omega_memory`, without a write.

    weights, rule, state: as in `omega_memory` (state None: the start weights). residual: r of the queries [B, T, H, V],
    or None for q itself. Returns [B, T, H, V] in q's dtype.
    """
    batch, tokens, heads, _ = q.shape
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    if rule.dual:
        # Tokens that neither decay nor write.
        one, zero = (q.new_full((batch, tokens, heads), fill, dtype=dtype) for fill in (1.0, 0.0))
        pair = state is None or (isinstance(state, DualState) and state.gamma.dim() == 4)
        gates = Gates(one, zero, zero, zero.unsqueeze(-1).expand(*zero.shape, rule.window) if pair else zero)
        v = q.new_zeros(batch, tokens, heads, weights[0].shape[1])
        kept = state is not None and isinstance(state, DualState) and state.residuals is not None
        r = residual if residual is not None else (q if kept else None)
        both = None if r is None else (r, torch.zeros_like(r))
        return omega_memory(q, torch.zeros_like(q), v, gates, weights, rule, state, both)[0]
    matrices = state.weights if state is not None else tuple(w.expand(batch, *w.shape) for w in weights)
    flat = lambda t: t.to(dtype).transpose(1, 2).flatten(0, 1)  # noqa: E731  [B, T, H, ...] -> [B H, T, ...]
    memory = memory_of(rule)
    held = tuple(w.to(dtype).flatten(0, 1) for w in oriented(memory, matrices))
    r = q if residual is None else residual
    if not rule.residual:
        r = q.new_zeros(batch, tokens, heads, weights[0].shape[1])
    y = memory.read(MatrixView(held), flat(q), flat(r))
    return y.unflatten(0, (batch, heads)).transpose(1, 2).to(q.dtype)


def check_implementation(
    impl: str, rule: MemoryRule, weights: tuple[Tensor, ...], products: torch.dtype | None = None
) -> None:
    """Raise ValueError if `impl` cannot run `rule` with these start weights [H, rows, cols] where they lie.

    products: as calls will give it; None: the weights' dtype. What `omega_memory` would say at its first call, before
    there is one. What calls need of the host goes to the GPU here, so that a CUDA graph can capture the first of them.
    """
    # Weights begin with a layer onto V and end with one from D.
    widths = (weights[-1].shape[-1], weights[0].shape[-2])
    q, v = (weights[0].new_empty(1, 1, 1, width) for width in widths)
    if impl != "auto" or q.is_cuda:
        chosen = _choose(impl, rule, q, v, weights, _operands(weights[0].dtype if products is None else products))
        if chosen == "triton" and rule.ns_steps:
            _gpu("newton_schulz").coefficient_table(rule.ns_steps, rule.ns_coefficients, q.device)


def _operands(dtype: torch.dtype) -> torch.dtype:
    """What operands of products are rounded to, for tensors of this dtype."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def _choose(
    impl: str, rule: MemoryRule, q: Tensor, v: Tensor, weights: tuple[Tensor, ...], products: torch.dtype
) -> str:
    """The implementation to take; "auto" takes the GPU's kernels on a GPU where they cover the call."""
    if impl not in ("auto", "triton"):
        return impl
    refused: str | None = "is for tensors on a GPU"
    if impl == "triton" or q.is_cuda:
        try:
            refused = _gpu("coverage").refusal(rule, q, v, weights, products)
        except ModuleNotFoundError:
            refused = "needs the atlas_kernels package, which is not installed"
    if impl == "triton":
        if refused:
            raise ValueError(f"impl='triton' {refused}; take impl='chunked'")
        return impl
    chosen, why = ("chunked", f": 'triton' {refused}") if refused else ("triton", ": it covers this call")
    if (message := f"omega_memory: impl='auto' chose '{chosen}'{why}") not in _announced:
        _announced.add(message)
        logger.info(message)
    return chosen


def _gpu_kernels(rule: MemoryRule, weights: tuple[Tensor, ...], products: torch.dtype) -> Kernels:
    """What replaces torch in the chunk form."""
    windows = _gpu("windows").windows
    if rule.ns_steps:
        chain = _gpu("chain")
        if chain.covers(rule, weights, products):
            held = chain.held_of_step(rule, products)
            scan, of = chain.segment_chain(products), chain.chain_coefficients
            return Kernels(segment=scan, coefficients=of, windows=windows, held_of_step=held)
        gpu = _gpu("orthogonal_writes")
        # One matrix a write, in the dtype of products, is held, and no iterate.
        return Kernels(
            anchor=partial(gpu.ProductReader, products=products),
            orthogonal=partial(gpu.OrthogonalSteps, products=products),
            held_of_step=1 / rule.ns_steps,
            windows=windows,
        )
    segment = _gpu("scan").segment_scan(products)
    return Kernels(coefficients=_gpu("coefficients").coefficients, segment=segment, windows=windows)


def _gpu(module: str) -> ModuleType:
    """A module of the Triton kernels. By its name: this file also travels with an exported model, and transformers
    refuses to load one whose files import what is not installed."""
    return importlib.import_module(f"atlas_kernels.gpu.{module}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], legend: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {legend} = {shape}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype")


def _check(
    impl: str,
    rule: MemoryRule,
    weights: tuple[Tensor, ...],
    inputs: Inputs,
    state: State | None,
    positions: Tensor | None,
) -> None:
    """Raise ValueError where the arguments of `omega_memory` do not fit together."""
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl={impl!r} is unknown; choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    _check_tokens(inputs, rule)
    _check_weights(weights, rule, inputs.q, inputs.v)
    _check_residual(inputs, rule)
    if state is not None:
        _check_state(state, rule, weights, inputs)
    _check_positions(positions, rule, inputs.q)
    if rule.dual and impl == "reference":
        raise ValueError(
            f"impl='reference' carries no state for kernel={rule.kernel!r}; take impl='chunked', or "
            "omega_memory_dual_reference for a whole sequence"
        )


def _check_tokens(inputs: Inputs, rule: MemoryRule) -> None:
    q, v, gates = inputs.q, inputs.v, inputs.gates
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, T, H, D] with at least one token")
    if v.dim() != 4:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected [B, T, H, V]")
    batch, tokens, heads, width = q.shape
    _expect("q", q, (batch, tokens, heads, width), "[B, T, H, D]")
    _expect("k", inputs.k, (batch, tokens, heads, width), "[B, T, H, D] like q")
    _expect("v", v, (batch, tokens, heads, v.shape[-1]), "[B, T, H, V]")
    for name in ("alpha", "eta", "theta"):
        _expect(f"gates.{name}", getattr(gates, name), (batch, tokens, heads), "[B, T, H]")
    if gates.pair:
        _expect("gates.gamma", gates.gamma, (batch, tokens, heads, rule.window), "[B, T, H, window]")
    else:
        _expect("gates.gamma", gates.gamma, (batch, tokens, heads), "[B, T, H] (source) or [B, T, H, window] (pair)")


def _check_positions(positions: Tensor | None, rule: MemoryRule, q: Tensor) -> None:
    if positions is None:
        return
    if positions.shape != q.shape[:2] or positions.is_floating_point():
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}, dtype {positions.dtype}; expected whole numbers [B, T] = "
            f"{tuple(q.shape[:2])}"
        )
    if rule.dual:
        raise ValueError(
            f"positions was given, but kernel={rule.kernel!r} keeps its sources over document borders; unpack the batch"
        )


def _check_weights(weights: tuple[Tensor, ...], rule: MemoryRule, q: Tensor, v: Tensor) -> None:
    heads, width, value = q.shape[2], q.shape[3], v.shape[3]
    if rule.memory == "linear":
        expected, legend = [(heads, value, width)], ["[H, V, D]"]
    else:
        hidden = weights[-1].shape[-2] if weights and weights[-1].dim() == 3 else 0
        inner = 2 if rule.memory == "gated_mlp" else 1
        expected = [(heads, value, hidden)] + [(heads, hidden, width)] * inner
        legend = ["[H, V, F]"] + ["[H, F, D]"] * inner
    if len(weights) != len(expected):
        raise ValueError(
            f"weights holds {len(weights)} matrices; memory={rule.memory!r} takes {len(expected)}: {', '.join(legend)}"
        )
    for i, (w, shape, text) in enumerate(zip(weights, expected, legend, strict=True)):
        _expect(f"weights[{i}]", w, shape, text)


def _check_residual(inputs: Inputs, rule: MemoryRule) -> None:
    q, v, residual = inputs.q, inputs.v, inputs.residual
    if rule.memory == "linear":
        if residual is not None:
            raise ValueError("residual was given, but memory='linear' has none; pass residual=None")
    elif not rule.residual:
        if residual is not None:
            raise ValueError("residual was given, but the rule has residual=False; pass residual=None")
    elif residual is None:
        if q.shape[-1] != v.shape[-1]:
            raise ValueError(
                f"residual=None takes the lifted input as the residual, which needs D = V; got D={q.shape[-1]}, "
                f"V={v.shape[-1]}; pass residual=(r_q, r_k), [B, T, H, V] each"
            )
    else:
        for name, r in zip(("residual[0]", "residual[1]"), residual, strict=True):
            _expect(name, r, tuple(v.shape), "[B, T, H, V] like v")


def _check_state(state: State, rule: MemoryRule, weights: tuple[Tensor, ...], inputs: Inputs) -> None:
    batch, _, heads, width = inputs.q.shape
    halo = rule.window - 1
    if isinstance(state, DualState) != rule.dual:
        raise ValueError(f"state is a {type(state).__name__}, of a call with another kernel than {rule.kernel!r}")
    if isinstance(state, DualState):
        _expect("state.alpha", state.alpha, (batch, state.position % rule.chunk, heads), "[B, position % chunk, H]")
        return
    for name, matrices in zip(("weights", "momentum", "anchor"), state.matrices(), strict=True):
        if len(matrices) != len(weights):
            raise ValueError(f"state.{name} holds {len(matrices)} matrices; this memory has {len(weights)}")
        for i, (m, w) in enumerate(zip(matrices, weights, strict=True)):
            _expect(f"state.{name}[{i}]", m, (batch, *w.shape), "[B, H, rows, cols]")
    _expect("state.keys", state.keys, (batch, halo, heads, width), "[B, window-1, H, D]")
    _expect("state.values", state.values, (batch, halo, heads, inputs.v.shape[-1]), "[B, window-1, H, V]")
    for name, given, wanted in (
        ("residuals", state.residuals, inputs.residual is not None),
        ("gamma", state.gamma, not inputs.gates.pair),
        ("pending", state.pending, rule.sums_steps),
    ):
        if (given is not None) != wanted:
            other = {"gamma": "gates", "pending": "steps (rule.ns_step, rule.ns_period)"}.get(name, name)
            raise ValueError(
                f"state.{name} is {'missing' if wanted else 'present'}; the state comes from a call with other {other}"
            )
    if state.pending is not None:
        _expect("state.pending", state.pending, (batch, heads), "[B, H]")
