"""A made-up result, as evaluate writes it, and its report."""

import copy
from typing import Any

from libprune.report.gallery import NAMES
from libprune.report.markdown import Picture
from libprune.report.provenance import Provenance
from libprune.report.report import compose_report

PROVENANCE = Provenance("a|b `<model>`\nof mine", "llama", "some | *text*", 64, 128, 7, "0123abcd", changed=True)
PICTURES = [Picture(name, f"alt of {name}", f"caption of {name}", b"png") for name in NAMES]

EVALUATION: dict[str, Any] = {
    "plan": {
        "criterion": "taylor_2nd",
        "scaling": "none",
        "fusion": "none",
        "worth": "none",
        "ratio_asked": 0.2,
        "method": "global",
        "ratio": 0.2,
        "ratio_of": "decoder",
        "objective": "macs",
        "shape": "uniform",
        "model": "0f0f",
        "minutes": None,
        "kept_set_overlap": {"taylor": 0.98765},
        "gradient_orders": {"taylor": 1},
    },
    "dense": {
        "perplexity": 20.741,
        "perplexity_se": 0.311,
        "decoder_parameters": 106_168_320,
        "total_parameters": 134_515_008,
        "bytes": 269_030_016,
        "cache_bytes": 23_040,
        "macs_per_token": 134_479_872,
        "prefill": 1234.5,
        "decode": 56.7,
    },
    "pruned": {
        "perplexity": 26.372,
        "perplexity_se": 0.405,
        "decoder_parameters": 84_934_656,
        "total_parameters": 113_281_344,
        "bytes": 226_562_688,
        "cache_bytes": 15_360,
        "macs_per_token": 113_246_208,
        "prefill": 1481.4,
        "decode": 68.9,
        "decoder_share_removed": 0.2,
        "total_share_removed": 0.1578,
        "macs_share_removed": 0.1581,
    },
    "pruning": {
        "slice": {"repair": "local"},
        "repair": {
            "lost_before": 0.2211,
            "lost_after": 0.1322,
            "lost_held_out_before": 0.2233,
            "lost_held_out_after": 0.1644,
        },
        "proof": {"logit_difference": 2.5e-6, "logit_scale": 33.1},
        "versions": {"libprune": "9.8.7", "torch": "6.5.4", "transformers": "5.99"},
    },
    "model": {
        "type": "llama",
        "head": "causal_lm",
        "sizes": {"model": 576, "kv": 3, "q": 3, "d": 64, "ffn": 1536},
        "biases": [],
    },
    "units": {"attention": 3, "mlp": 1536},
    "kept": [{"attention": 3, "mlp": 1200}, {"attention": 2, "mlp": 1111}],
    "perplexity_ratio": {"value": 1.2715, "se": 0.0086},
    "tasks": {
        "piqa": {
            "dense": {"n": 1838.0, "acc": 0.68, "acc_se": 0.011, "acc_norm": 0.6714, "acc_norm_se": 0.01099},
            "pruned": {"n": 1838.0, "acc": 0.6, "acc_se": 0.012, "acc_norm": 0.6102, "acc_norm_se": 0.0114},
        },
        "winogrande": {"dense": {"acc": 0.51, "acc_se": 0.014}, "pruned": {"acc": 0.52, "acc_se": 0.014}},
    },
    "continuations": [
        {"window": 7, "prompt": "Once upon", "text": "a time", "dense": "a river", "pruned": "a a", "agree": 1}
    ],
    "speed": {
        "prefill_ratio": 1.204,
        "decode_ratio": 1.219,
        "prefill_spread": [1.11, 1.29],
        "decode_spread": [1.15, 1.26],
    },
    "protocol": {
        "text": "some text",
        "windows": 24,
        "length": 1024,
        "prompt_tokens": 256,
        "decode_tokens": 16,
        "rounds": 5,
        "continuation_tokens": 2,
        "dtype": "bfloat16",
        "device": "cpu",
    },
}


def changed(**sections: Any) -> dict[str, Any]:
    """The evaluation with some keys of some sections replaced."""
    result = copy.deepcopy(EVALUATION)
    for section, values in sections.items():
        result[section] = result[section] | values if isinstance(values, dict) else values
    return result


def report_of(result: dict[str, Any], pictures: list[Picture] = PICTURES, ratio: float | None = 12.34) -> str:
    """The report of a result."""
    return compose_report(result, "out/pruned", PROVENANCE, pictures, ratio)
