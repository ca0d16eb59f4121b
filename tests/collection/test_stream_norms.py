"""Behind a part whose output a norm on the stream divides, tokens count by what the norm leaves of them."""

import pytest
import torch

from libprune.collection.accumulator import Accumulator
from libprune.collection.stream_norms import inverse_deviation, stream_norms, watch_norms
from libprune.engine.describe import describe
from libprune.engine.surgery import hooked
from libprune.models.sequences import Sequences
from libprune.pipeline.sections import Activations
from libprune.pipeline.shards import GRAM, HELD_OUT
from libprune.statistics.activations import activation_groups, collect_activations
from tests.support.models import FAMILIES, tokens

POST_NORM = {"bert": 2, "roberta": 2, "distilbert": 2, "mpnet": 2, "llama": 0, "modernbert": 0, "olmo2": 0}


@pytest.mark.parametrize("name", POST_NORM)
def test_the_norms_on_the_stream_are_those_of_no_part(name):
    architecture = describe(FAMILIES[name](0))
    assert len(stream_norms(architecture, 1)) == POST_NORM[name]
    assert all(path.startswith(f"{architecture.layers_path}.1.") for path in stream_norms(architecture, 1))


@pytest.mark.parametrize("name", ["bert_embedding", "distilbert", "mpnet"])
def test_each_consumer_is_given_with_the_norm_behind_it(name):
    model, found = FAMILIES[name](0), {}
    architecture = describe(model)
    norms = [model.get_submodule(path) for path in stream_norms(architecture, 1)]
    streams = []
    with hooked(model) as handles, torch.no_grad():
        handles += watch_norms(model, architecture, 1, lambda entry, x, scale: found.setdefault(entry.part, (x, scale)))
        handles += [norm.register_forward_pre_hook(lambda module, args: streams.append(args[0])) for norm in norms]
        model(tokens(3, 7))
    assert list(found) == ["attention", "mlp"]
    for (x, scale), stream in zip(found.values(), streams, strict=True):
        assert x.shape[:2] == scale.shape[:2] == (3, 7)
        torch.testing.assert_close(scale[..., 0], 1 / stream.std(-1, correction=0))


def test_products_are_of_divided_inputs_and_the_mean_is_not():
    """So the mean, which the repair of biases reads, stays that of what the consumer gets."""
    model, ids = FAMILIES["bert_embedding"](0), tokens(4, 9)
    architecture = describe(model)
    sums = Accumulator(activation_groups(architecture, Activations()))
    collect_activations(model, architecture, [(0, 0, Sequences(ids))], sums)
    seen = {}
    with hooked(model) as handles, torch.no_grad():
        layer = model.encoder.layer[2].output
        handles.append(layer.dense.register_forward_pre_hook(lambda m, args: seen.update(x=args[0])))
        handles.append(layer.LayerNorm.register_forward_pre_hook(lambda m, args: seen.update(stream=args[0])))
        model(ids)
    x = seen["x"].flatten(0, 1)
    divided = x * inverse_deviation(seen["stream"]).flatten(0, 1)
    tensors, name = sums.finish(2), f"encoder.layer.2.output.dense{GRAM}"
    torch.testing.assert_close(tensors[name], divided.T @ divided / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tensors[f"{name}.mean"], x.mean(0), rtol=1e-4, atol=1e-6)
    assert not int(tensors[f"encoder.layer.2.output.dense{HELD_OUT}.tokens"]), "four sequences hold none out"
