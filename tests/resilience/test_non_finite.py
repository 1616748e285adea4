"""What follows NaN or inf, step by step: skips, returns, and the limits at which a run ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from atlas_megatron.config.sections import ResilienceConfig
from atlas_megatron.resilience.non_finite import Action, Policy, Trouble, error

BAD = Trouble("loss is nan", "layer 1 (memory)")


def actions(policy: Policy, troubles: str) -> list[Action]:
    """What is decided of steps from 1 on, '.' for one that is finite and 'x' for one that is not."""
    return [policy.decide(step, BAD if t == "x" else None).action for step, t in enumerate(troubles, 1)]


def test_it_goes_back_after_several_skips_in_a_row_alone() -> None:
    said: list[str] = []
    policy = Policy(ResilienceConfig(non_finite="skip", skips_in_a_row=2), said.append)
    go_on, skip, back = Action.CONTINUE, Action.SKIP, Action.RETURN
    assert actions(policy, ".x.xx.xx") == [go_on, skip, go_on, skip, back, go_on, skip, back]
    assert (policy.skipped, policy.returns) == (5, 2)
    assert said[2] == "step 5: loss is nan, first seen in layer 1 (memory): batch skipped (2 in a row, 3 in all)"
    # A return begins a new row.
    assert actions(policy, "x") == [skip]


def test_it_stops_at_once_unless_batches_may_be_skipped() -> None:
    said: list[str] = []
    policy = Policy(ResilienceConfig(non_finite="stop"), said.append)
    assert actions(policy, ".x") == [Action.CONTINUE, Action.STOP]
    assert policy.skipped == 0 and said == []


@pytest.mark.parametrize(
    ("counts", "limits", "why", "lines"),
    [
        ({"skipped": 4}, {"most_skipped": 4}, "resilience.most_skipped=4 batches were skipped", 0),
        ({"returns": 2}, {"most_returns": 2}, "resilience.most_returns=2 brought no more steps", 1),
    ],
)
def test_counts_of_a_resumed_run_reach_their_limits(
    counts: dict[str, int], limits: dict[str, int], why: str, lines: int
) -> None:
    said: list[str] = []
    policy = Policy(ResilienceConfig(non_finite="skip", skips_in_a_row=1, **limits), said.append, **counts)
    decision = policy.decide(7, BAD)
    assert (decision.action, decision.why) == (Action.STOP, why)
    # The batch that made it one return too many has been skipped, and is said.
    assert len(said) == lines


def test_the_error_names_step_layer_limit_and_checkpoint() -> None:
    assert str(error(3, BAD, "", None)).startswith(
        "step 3: loss is nan, first seen in layer 1 (memory); there is no checkpoint yet: lower train.lr"
    )
    ended = str(error(3, BAD, "a limit", Path("run/checkpoints/step_00000002")))
    assert "(memory); a limit; the last good checkpoint is run/checkpoints/step_00000002: " in ended
