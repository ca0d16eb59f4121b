"""The divergence of a changed model's predictions, against its definition."""

import numpy as np
import pytest
import torch

from libprune.engine.describe import describe
from libprune.engine.surgery import masked
from libprune.models.sequences import Sequences
from libprune.statistics.divergence import Divergence, stored_bytes
from tests.support.models import FAMILIES, random_plan, tokens
from tests.support.predictions import kl, logits_of


@pytest.mark.parametrize("kind", ["uniform", "per_layer", "holes"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_divergence_is_that_of_the_definition(family, kind):
    model, ids = FAMILIES[family](0), tokens(3, 12)
    architecture = describe(model)
    measure, dense = Divergence(model), logits_of(model, ids)
    with torch.no_grad():
        assert measure(0, Sequences(ids)).tolist() == [0, 0, 0]
        with masked(model, architecture, random_plan(architecture, kind)):
            found, expected = measure(0, Sequences(ids)), kl(dense, logits_of(model, ids))
    assert (expected > 0).all()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_an_unchanged_model_does_not_diverge_and_no_change_gives_less():
    model, ids = FAMILIES["llama"](0), tokens(4, 12)
    measure = Divergence(model)
    with torch.no_grad():
        measure(0, Sequences(ids))
        np.testing.assert_allclose(measure(0, Sequences(ids)).numpy(), 0, atol=1e-6)
        for scale in (1e-6, 1e-4, 1e-2, 1.0):
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
            assert (measure(0, Sequences(ids)) >= -1e-6).all()


def test_every_pass_is_compared_with_its_own_dense_predictions():
    model, ids = FAMILIES["llama"](0), tokens(4, 12)
    measure, dense = Divergence(model), logits_of(model, ids)
    with torch.no_grad():
        for number in (0, 1):
            measure(number, Sequences(ids[2 * number : 2 * number + 2]))
        model.lm_head.weight.add_(0.3)
        found = torch.cat([measure(number, Sequences(ids[2 * number : 2 * number + 2])) for number in (1, 0)])
    np.testing.assert_allclose(found.numpy(), kl(dense, logits_of(model, ids))[[2, 3, 0, 1]], rtol=1e-4, atol=1e-7)


def test_dense_predictions_are_kept_in_the_models_type():
    model, ids = FAMILIES["llama"](0).to(torch.bfloat16), tokens(3, 12)
    measure = Divergence(model)
    with torch.no_grad():
        measure(0, Sequences(ids))
        kept = measure._dense[0]
        assert kept.nbytes == stored_bytes(ids.numel(), model.config.vocab_size, torch.bfloat16)
        assert (measure(0, Sequences(ids)) == 0).all(), "the rounding alone is no divergence"
