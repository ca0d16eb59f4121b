import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.models.sequences import NO_TARGET
from libprune.recovery import losses
from libprune.recovery.losses import (
    Taught,
    TopPredictions,
    divergence,
    hidden_loss,
    prediction_loss,
    top_divergence,
)

BATCH, LENGTH, VOCAB = 3, 5, 11


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets_with(share: float, seed: int) -> torch.Tensor:
    """Targets of which about a share counts, at least one."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.randint(VOCAB, (BATCH, LENGTH), generator=random)
    counted = torch.rand((BATCH, LENGTH), generator=random) < share
    counted[0, 0] = True
    return targets.where(counted, NO_TARGET)


def by_hand(ours, theirs, targets, temperature: float, share: float) -> float:
    """The loss position by position, in float64, from the definitions."""
    values = []
    for row, other, target in zip(ours.flatten(0, 1), theirs.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target == NO_TARGET:
            continue
        p, q = (torch.softmax(one.double() / temperature, 0) for one in (other, row))
        apart = float((p * (p / q).log()).sum()) * temperature**2
        values.append((1 - share) * apart - share * float(torch.softmax(row.double(), 0)[target].log()))
    return sum(values) / len(values)


@given(
    st.integers(0, 99),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1, 2, 1000]),
)
def test_the_loss_is_the_mean_over_the_positions_with_a_target(seed, counted, temperature, share, size):
    ours, theirs = random_logits(seed, BATCH, LENGTH, VOCAB), random_logits(seed + 100, BATCH, LENGTH, VOCAB)
    targets = targets_with(counted, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "rows_at_once", lambda _: size)
        loss = prediction_loss(ours, targets, Taught(theirs), temperature, share)
    assert float(loss) == pytest.approx(by_hand(ours, theirs, targets, temperature, share), rel=1e-4)


def test_the_gradient_does_not_depend_on_the_parts(monkeypatch):
    theirs, targets = random_logits(1, BATCH, LENGTH, VOCAB), targets_with(0.9, 2)
    gradients = []
    for size in (1, 1000):
        monkeypatch.setattr(losses, "rows_at_once", lambda _, size=size: size)
        ours = random_logits(0, BATCH, LENGTH, VOCAB).requires_grad_()
        prediction_loss(ours, targets, Taught(theirs), 2.0, 0.4).backward()
        gradients.append(ours.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0][targets == NO_TARGET].abs().max() == 0


def test_labels_of_whole_sequences_are_targets_too():
    ours, theirs, labels = random_logits(0, BATCH, VOCAB), random_logits(1, BATCH, VOCAB), torch.tensor([0, 3, 7])
    loss = prediction_loss(ours, labels, Taught(theirs), 1.0, 0.5)
    assert float(loss) == pytest.approx(by_hand(ours[:, None], theirs[:, None], labels, 1.0, 0.5), rel=1e-4)


def top(logits: torch.Tensor, k: int, temperature: float) -> TopPredictions:
    found = (logits / temperature).log_softmax(-1).topk(k)
    return TopPredictions(found.values, found.indices.int())


@given(st.integers(0, 99), st.integers(1, VOCAB), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_largest_predictions_never_diverge_more_than_all(seed, k, temperature):
    ours, theirs = random_logits(seed, LENGTH, VOCAB), random_logits(seed + 100, LENGTH, VOCAB)
    part, whole = top_divergence(ours, top(theirs, k, temperature), temperature), divergence(ours, theirs, temperature)
    assert (part <= whole * (1 + 1e-4) + 1e-4).all()
    assert (part >= -1e-4).all()
    if k >= VOCAB - 1:  # the rest is one prediction
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-3)


def test_equal_predictions_do_not_diverge():
    logits = random_logits(0, LENGTH, VOCAB)
    assert divergence(logits, logits, 1.0).abs().max() < 1e-6
    assert top_divergence(logits, top(logits, 4, 1.0), 1.0).abs().max() < 1e-5


def test_hidden_states_are_compared_with_the_input_of_the_next_layer_that_is_left():
    dense = [random_logits(number, 2, 3, 4) for number in range(6)]  # five layers
    counted = torch.ones(2, 3, dtype=torch.bool)
    kept = [0, 2, 3]  # layers 1 and 4 are gone
    same = [dense[0], dense[2], dense[3], dense[5]]
    assert float(hidden_loss(same, dense, kept, counted)) == 0
    other = [*same[:2], 2 * dense[3], dense[5]]  # off by its own size in one of three
    assert float(hidden_loss(other, dense, kept, counted)) == pytest.approx(1 / 3)


def test_hidden_states_behind_the_end_of_a_sequence_do_not_count():
    dense = [random_logits(number, 2, 3, 4) for number in range(3)]
    counted = torch.tensor([[True, True, False], [True, True, True]])
    ours = [state.clone() for state in dense]
    ours[1][0, 2] = 99
    assert float(hidden_loss(ours, dense, [0, 1], counted)) == 0
