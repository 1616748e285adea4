"""What the recipe search compares: every hypothesis is a row, by name.

The first row is the recipe: the preset `atlas`, with four writes a chunk. Each other row changes it in one place, and
what is derived from that place follows.
"""

from __future__ import annotations

from experiments.shared.protocol import Contender

# What the memories start with by default, for a Gated DeltaNet.
OURS = ("delta.late_keys=true", "delta.open_gate=true", "delta.copy_start=true")

# The numbers under `asks`.
HYPOTHESES = {
    1: "norm",
    2: "retention and step",
    3: "what a write stands for",
    4: "how strongly a weak momentum is written",
    5: "reads of a token's own chunk",
    6: "bounded memories",
    7: "the write gate",
    8: "starts, sizes, and the paper's ablations",
    9: "anchors at the start weights",
    10: "magnitude after Newton-Schulz",
    11: "writing the last layer alone",
    13: "who reads the own chunk",
}
# What is no row, and why.
EXCLUDED = (
    "Hypothesis 12, that Newton-Schulz pays where keys are frequent and rare, is a question of recall: this text does "
    "not tell frequent keys from rare ones. Storing the next token's value under a token's key, as others report, is "
    "what all rows start with: keys begin as the query of the token before."
)

# With the first row's start of eta and alpha.
ONE_CHUNK = ("memory.chunk=256", "memory.eta_start=0.04", "memory.alpha_start=0.9975")


def _row(*words: str, asks: str, trial: str = "") -> Contender:
    return Contender(words, asks, trial)


def _gate(*words: str) -> tuple[str, ...]:
    return ("memory.write_gate=true", "memory.ns_step=sum", *words)


SCREEN: dict[str, Contender] = {
    "atlas": _row(asks="the recipe that the others change"),
    # Members and baselines.
    "atlas++": _row("memory.preset=atlas++", asks="the paper's gated memory, without residual"),
    "omeganet": _row("memory.preset=omeganet", asks="a member"),
    "omeganet without residual": _row("memory.preset=omeganet", "memory.residual=false", asks="does it gain too?"),
    "titans": _row("memory.preset=titans", asks="a member"),
    "titans without residual": _row("memory.preset=titans", "memory.residual=false", asks="does it gain too?"),
    "Gated DeltaNet": _row("model.pattern=G-G-", asks="baseline"),
    "Gated DeltaNet, our starts": _row("model.pattern=G-G-", *OURS, asks="baseline, with the memories' starts"),
    "DeltaNet": _row("model.pattern=D-D-", asks="baseline"),
    "attention": _row("model.pattern=F-F-", asks="baseline"),
    # 1: norm.
    "norm = layer": _row("memory.norm=layer", asks="1: an output norm, as the members without Newton-Schulz have"),
    "norm on the read": _row(asks="1: a norm on what is read, not in the inner loss", trial="read norm"),
    "damped gradient": _row("memory.anchor_gradient=0.3", asks="1: does damping help?"),
    # 2: retention and step.
    "retention 0.99": _row("memory.alpha_start=0.99", asks="2: it forgets four times as fast"),
    "retention 0.9995": _row("memory.alpha_start=0.9995", asks="2: a fifth as fast"),
    "half of the step": _row("memory.eta_per_token=0.0025", asks="2"),
    "twice the step": _row("memory.eta_per_token=0.01", asks="2"),
    "heads remember 50 to 3200 tokens": _row(
        asks="2: a head starts with a retention of its own, and a step as much smaller as it is nearer one",
        trial="spans of 50 to 3200",
    ),
    # 3 and 4: what a write stands for.
    "a write a chunk": _row("memory.ns_period=32", asks="3: and the retention that follows"),
    "a write a token": _row("memory.ns_period=1", asks="3: as the paper"),
    "the sum of a period's steps": _row("memory.ns_step=sum", asks="3: a write takes the steps it stands for"),
    "steps weigh gradients": _row(
        "memory.ns_step=sum", asks="3, 4: each token's step weighs its gradient too", trial="weighed"
    ),
    "momentum decay 0.97": _row("memory.theta_start=0.97", asks="3: more than the last ten tokens are written"),
    "momentum decay 0.5": _row("memory.theta_start=0.5", asks="3: fewer"),
    "without momentum": _row("memory.momentum=false", asks="3: only the last window is written"),
    "step x |S| / (|S| + 10)": _row(asks="4: a weak momentum is written weakly", trial="saturating"),
    "floor 3": _row(asks="4: singular values below 3 are written as they are, those above as ones", trial="floor 3"),
    # 5: a token cannot read its own chunk.
    "provisional writes": _row(asks="5: raw writes are read until the period's own", trial="provisional"),
    "chunk 8": _row("memory.chunk=8", "memory.ns_period=2", asks="5: fresher anchors; the retention that follows"),
    # 6: bounded memories.
    "W1 starts large": _row(asks="8: at a linear layer's scale", trial="large start"),
    "W1 starts large, rows keep their length": _row(asks="6: in place of drift", trial="large start + bounded"),
    # 7: the write gate.
    "write gate": _row(*_gate(), asks="7: without a budget"),
    "write gate, budget 0.01": _row(*_gate("train.write_budget=0.01"), asks="7"),
    # 8: starts and sizes.
    "without residual": _row("memory.residual=false", asks="8: M(x) = W1 act(W2 x), and W1's start"),
    "W1 starts small": _row(asks="8: a fifth", trial="small start"),
    "W2 starts with columns of length 1": _row(asks="8: hidden units that do not bend", trial="W2 of length 1"),
    "W2 starts twice as large": _row(asks="8", trial="W2 x 2"),
    "sqrt(rows / cols) scale": _row(asks="8: Muon's scale of W2's update", trial="tall"),
    "three Newton-Schulz steps": _row("memory.ns_steps=3", asks="8"),
    "polar express": _row("memory.ns_coefficients=polar_express", asks="8: the coefficients"),
    "dot loss": _row("memory.loss=dot", asks="8: what is written is the value, whatever the memory answers"),
    "degree 3": _row("memory.degree=3", asks="8: of the feature map"),
    "without phi": _row("memory.feature_map=identity", asks="8: the paper's Table 6"),
    "c = 1": _row("memory.window=1", asks="8: the paper's Table 6"),
    "c = 16": _row("memory.window=16", asks="8: the paper's Fig 5"),
    "linear memory": _row("memory.network=linear", asks="8: the paper's Table 6"),
    "F = V": _row("memory.expansion=1", asks="8"),
    "F = 4 V": _row("memory.expansion=4", asks="8"),
    "2 heads of 64": _row("memory.heads=2", "memory.head_dim=64", asks="8"),
    "values of length 1": _row(asks="8: as the keys", trial="unit values"),
    "keys without SiLU": _row(asks="8: keys that share no mean", trial="linear keys"),
    "keys as drawn": _row("memory.late_keys=false", "memory.copy_start=false", asks="8: keys and values start random"),
    "values as drawn": _row("memory.copy_start=false", asks="8: an answer does not start as the token that followed"),
    "output gate as drawn": _row("memory.open_gate=false", asks="8: reads start with a random sign"),
    # 9: anchors at the start weights.
    "one chunk": _row(*ONE_CHUNK, asks="9: all gradients at the start weights"),
    # 10: magnitude after Newton-Schulz.
    "x nuclear norm": _row(asks="10: steepest descent in the spectral norm", trial="steepest"),
    "x Frobenius norm": _row(asks="10", trial="sized"),
    "clipped, no Newton-Schulz": _row(asks="10: the momentum, its norm at most 4", trial="clipped"),
    # 11: the last layer alone.
    "only W1 is written": _row(asks="11", trial="last layer"),
    # 13: who reads the own chunk.
    "MAG": _row("model.pattern=A-A-", asks="13: beside a sliding window of a chunk"),
    "MAG of Gated DeltaNet": _row("model.pattern=G-*-", *OURS, asks="13: the same window after Gated DeltaNet"),
}
