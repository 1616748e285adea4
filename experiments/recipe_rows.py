"""What the recipe search compares: every hypothesis is a row, by name.

The first row is the recipe: the preset, with the defaults that won. Each other row changes it in one place. Keys,
values and output start as they are drawn, except in the rows about starts, because those were tried last.
"""

from __future__ import annotations

from experiments.shared.protocol import Contender

DRAWN = ("memory.late_keys=false", "memory.open_gate=false", "memory.copy_start=false")
# Its retention and its residual are those that the finished rows were trained with. The defaults are others since:
# language_model.py.
ORTHOGONAL = ("memory.preset=atlas", "memory.residual=true", "memory.alpha_start=0.99")
ATLAS = (*ORTHOGONAL, *DRAWN)

# The numbers under `asks`.
HYPOTHESES = {
    1: "norm and start",
    2: "retention and step",
    3: "what a write stands for",
    4: "how strongly a weak momentum is written",
    5: "reads of a token's own chunk",
    6: "bounded memories",
    7: "the write gate",
    8: "starts and sizes",
    10: "magnitude after Newton-Schulz",
    11: "writing the last layer alone",
    13: "who reads the own chunk",
}

# What the memories start with by default, for a Gated DeltaNet.
OURS = ("delta.late_keys=true", "delta.open_gate=true", "delta.copy_start=true")

LONG, SHORT = "memory.alpha_start=0.998", ("memory.chunk=8", "memory.ns_period=8")


def _atlas(*words: str, asks: str, trial: str = "") -> Contender:
    return Contender((*ATLAS, *words), asks, trial)


def _started(*words: str, asks: str, trial: str = "") -> Contender:
    """A row with the three starts that are the default now."""
    return Contender((*ORTHOGONAL, *words), asks, trial)


def _member(preset: str, *words: str, asks: str = "the member as it is") -> Contender:
    return Contender((f"memory.preset={preset}", *DRAWN, *words), asks)


SCREEN: dict[str, Contender] = {
    "atlas": _atlas(asks="the recipe that the others change"),
    # Members and baselines.
    "omeganet": _member("omeganet"),
    "omeganet, c = 1": _member("omeganet", "memory.window=1", asks="5: control, without a window"),
    "titans": _member("titans"),
    "atlas++": _member("atlas++", "memory.residual=true", "memory.alpha_start=0.99"),
    "Gated DeltaNet": Contender(("model.pattern=G-G-",), "baseline"),
    "DeltaNet": Contender(("model.pattern=D-D-",), "baseline"),
    "attention": Contender(("model.pattern=F-F-",), "baseline"),
    # 1: norm and start.
    "norm = layer": _atlas("memory.norm=layer", asks="1: an output norm, as the members without Newton-Schulz have"),
    "norm = layer, as shipped before": Contender(
        (*ATLAS, "memory.norm=layer", "memory.alpha_start=0.99609375", "memory.anchor_gradient=0.3"),
        "1: the recipe before this search: retention 1 - 1/length, damped gradient, the step of the last token",
    ),
    "norm on the read": _atlas(asks="1: a norm on what is read, not in the inner loss", trial="read norm"),
    "damped gradient": _atlas("memory.anchor_gradient=0.3", asks="1: does damping still help?"),
    # 2: retention and step.
    "retention 0.9": _atlas("memory.alpha_start=0.9", asks="2"),
    "retention 0.95": _atlas("memory.alpha_start=0.95", asks="2"),
    "retention 0.98": _atlas("memory.alpha_start=0.98", asks="2"),
    "retention 0.998": _atlas("memory.alpha_start=0.998", asks="2"),
    "step 0.03": _atlas("memory.eta_start=0.03", asks="2: a tenth of the step"),
    "step 0.1": _atlas("memory.eta_start=0.1", asks="2: a third of the step"),
    "step 1": _atlas("memory.eta_start=1.0", asks="2: three times the step"),
    "heads remember 25 to 1600 tokens": _atlas(
        asks="2: a head starts with a retention of its own, and a step as much smaller as it is nearer one",
        trial="spans of 25 to 1600",
    ),
    "heads remember 50 to 400 tokens": _atlas(asks="2", trial="spans of 50 to 400"),
    # 3 and 4: what a write stands for.
    "the sum of a period's steps": _atlas("memory.ns_step=sum", asks="3: a write takes the steps it stands for"),
    "momentum decay 0.97": _atlas("memory.theta_start=0.97", asks="3: of 32 tokens more than the last ten are written"),
    "momentum decay 0.99": _atlas("memory.theta_start=0.99", asks="3"),
    "sum, momentum decay 0.97": _atlas("memory.ns_step=sum", "memory.theta_start=0.97", asks="3: both"),
    "steps weigh gradients": _atlas(
        "memory.ns_step=sum", asks="3, 4: each token's step weighs its gradient too", trial="weighed"
    ),
    "without momentum": _atlas("memory.momentum=false", asks="3: only the last window is written"),
    "step x |S| / (|S| + 10)": _atlas(asks="4: a weak momentum is written weakly", trial="saturating"),
    "floor 1": _atlas(asks="4: singular values below 1 are written as they are, those above as ones", trial="floor 1"),
    "floor 3": _atlas(asks="4", trial="floor 3"),
    "floor 10": _atlas(asks="4", trial="floor 10"),
    # 5: a token cannot read its own chunk.
    "provisional writes": _atlas(
        "memory.ns_step=sum", asks="5: raw writes are read until the chunk's own", trial="provisional"
    ),
    "period 8": _atlas("memory.ns_period=8", asks="5: four writes a chunk"),
    "chunk 16": _atlas("memory.chunk=16", "memory.ns_period=16", asks="5: shorter chunks, a write each"),
    "chunk 8": _atlas("memory.chunk=8", "memory.ns_period=8", asks="5: shorter chunks, a write each"),
    # 6: bounded memories.
    "rows keep their length": _atlas(asks="6: in place of drift", trial="large start + bounded"),
    # 7: the write gate.
    "write gate": _atlas("memory.write_gate=true", "memory.ns_step=sum", asks="7: without a budget"),
    "write gate, budget 0.01": _atlas(
        "memory.write_gate=true", "memory.ns_step=sum", "train.write_budget=0.01", asks="7"
    ),
    # 8: starts and sizes.
    "without residual": _atlas(asks="8: M(x) = W1 act(W2 x)", trial="no residual"),
    "W1 starts large": _atlas(asks="8: at a linear layer's scale", trial="large start"),
    "Omega gates start at the own gradient": _atlas(asks="2: as an online rule", trial="own gradient first"),
    "Omega gates start at the own gradient, 0.1": _atlas(asks="2", trial="own gradient first, 0.1"),
    "momentum decay 0.3": _atlas("memory.theta_start=0.3", asks="3: a write of few tokens"),
    "W2 starts 2 times as large": _atlas(asks="8: hidden units that bend", trial="W2 x 2"),
    "W2 starts 4 times as large": _atlas(asks="8", trial="W2 x 4"),
    "W2 starts 8 times as large": _atlas(asks="8", trial="W2 x 8"),
    "sqrt(rows / cols) scale": _atlas(asks="8: Muon's scale of W2's update", trial="tall"),
    "3 Newton-Schulz steps": _atlas("memory.ns_steps=3", asks="8"),
    "polar express": _atlas("memory.ns_coefficients=polar_express", asks="8"),
    "degree 3": _atlas("memory.degree=3", asks="8: of the feature map"),
    "without phi": _atlas("memory.feature_map=identity", asks="the paper's Table 6"),
    "taylor, heads of 8": _atlas(
        *("memory.feature_map=taylor", "memory.head_dim=8", "memory.heads=16"), asks="8: Eq 5's kernel exactly"
    ),
    "c = 1": _atlas("memory.window=1", asks="the paper's Table 6"),
    "c = 16": _atlas("memory.window=16", asks="the paper's Fig 5"),
    "linear memory": _atlas("memory.network=linear", asks="the paper's Table 6"),
    "F = V": _atlas("memory.expansion=1", asks="8"),
    "F = 4 V": _atlas("memory.expansion=4", asks="8"),
    "2 heads of 64": _atlas("memory.heads=2", "memory.head_dim=64", asks="8"),
    "values of length 1": _atlas(asks="8: as the keys and the residual", trial="unit values"),
    "keys without SiLU": _atlas(asks="8: keys that share no mean", trial="linear keys"),
    "both": _atlas(asks="8", trial="linear keys + unit values"),
    "a value under the key before": _atlas(asks="the next token's value under this key", trial="next value"),
    "keys start as queries": _atlas(asks="8: starts", trial="keys as queries"),
    "keys start as the queries before": _atlas(
        "memory.late_keys=true", asks="8: the memory starts by answering what followed a query"
    ),
    "keys start as the queries before, half the heads": _atlas(asks="8", trial="late keys of half the heads"),
    "copies at the start": _atlas(
        *("memory.late_keys=true", "memory.copy_start=true"), asks="8: and the answer starts as the token that followed"
    ),
    "an open gate": _atlas("memory.open_gate=true", asks="8: reads start without a random sign"),
    "an open gate, late keys": _atlas("memory.open_gate=true", "memory.late_keys=true", asks="8"),
    "copies through an open gate": Contender(ORTHOGONAL, "8: all three; the default"),
    "Gated DeltaNet, late keys": Contender(("model.pattern=G-G-", "delta.late_keys=true"), "8: so its keys"),
    "Gated DeltaNet, copies through an open gate": Contender(("model.pattern=G-G-", *OURS), "8: all three"),
    # With all three starts: the inner loss, how long a memory keeps, how recent its anchors are.
    "copies, dot loss": _started("memory.loss=dot", asks="what is written is the value, whatever the memory answers"),
    "copies, dot loss, retention 0.998": _started("memory.loss=dot", LONG, asks="2"),
    "copies, retention 0.998": _started(LONG, asks="2"),
    "copies, read residual, retention 0.998": _started(
        LONG, asks="the residual belongs to the read: the inner loss asks W1 act(W2 k) for v", trial="read residual"
    ),
    "copies, chunk 8": _started(*SHORT, asks="fresher anchors"),
    "copies, chunk 8, damped": _started(*SHORT, "memory.anchor_gradient=0.3", asks="fresher anchors"),
    "copies, chunk 8, dot loss, retention 0.998": _started(*SHORT, "memory.loss=dot", LONG, asks="all of it"),
    "copies, provisional writes": _started(asks="5: each token's own step", trial="provisional, own steps"),
    "copies, decay to the start": _started(asks="2: what decays is what was written", trial="to start"),
    "copies, norm on the read": _started(asks="1", trial="read norm"),
    "titans, copies": Contender(("memory.preset=titans",), "the member with these starts"),
    "titans, copies, chunk 8": Contender(("memory.preset=titans", "memory.chunk=8"), "fresher anchors, larger steps"),
    "omeganet, copies": Contender(("memory.preset=omeganet",), "the member with these starts"),
    "omeganet, copies, chunk 8": Contender(
        ("memory.preset=omeganet", "memory.chunk=8"), "fresher anchors, larger steps"
    ),
    # 10: magnitude after Newton-Schulz.
    "x nuclear norm": _atlas(asks="10: steepest descent in the spectral norm", trial="steepest"),
    "x Frobenius norm": _atlas(asks="10", trial="sized"),
    "clipped, no Newton-Schulz": _atlas(asks="10: the momentum, its norm at most 4", trial="clipped"),
    # 11: the last layer alone.
    "only W1 is written": _atlas(asks="11", trial="last layer"),
    # 13: who reads the own chunk.
    "MAG": _atlas("model.pattern=A-A-", asks="13: beside a sliding window of a chunk"),
    "MAG of Gated DeltaNet": Contender(("model.pattern=G-*-",), "13: the same window after Gated DeltaNet"),
}
