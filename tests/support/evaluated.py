"""A made-up result, as evaluate writes it, and its report."""

import copy
from pathlib import Path
from typing import Any

from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Recover
from libprune.report.gallery import NAMES
from libprune.report.markdown import Picture
from libprune.report.provenance import Provenance
from libprune.report.report import compose_report

PROVENANCE = Provenance(
    "<b>my</b> *model*", "a|b `<model>`\nof mine", "llama", "some | *text*", 64, 128, 7, "0123abcd", changed=True
)
PICTURES = [Picture(name, f"alt of {name}", f"caption of {name}", b"png", f"<svg>{name}</svg>") for name in NAMES]
"""All pictures, that of a training included."""
LAYOUT = Layout(Path("out"))

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
        "channel_multiple": 1,
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
        "state_bytes": 0,
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
        "state_bytes": 0,
        "macs_per_token": 113_246_208,
        "prefill": 1481.4,
        "decode": 68.9,
        "decoder_share_removed": 0.2,
        "total_share_removed": 0.1578,
        "macs_share_removed": 0.1581,
        "draft": {
            "acceptance": 0.7812,
            "acceptance_se": 0.0034,
            "agreement": 0.7456,
            "agreement_se": 0.0052,
            "step_ratio": 0.82,
            "tokens": 1,
            "speedup": 0.9787,
        },
    },
    "pruning": {
        "tokens": "0e0e",
        "repair_text": None,
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
    "unit_kinds": {"attention": "groups", "mlp": "channels"},
    "kept": [{"attention": 3, "mlp": 1200}, {"attention": 2, "mlp": 1111}],
    "perplexity_ratio": {"value": 1.2715, "se": 0.0086},
    "recovered": None,
    "recovery": None,
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
        "tokens": "0d0d",
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


ROUTING: dict[str, Any] = {
    "removed_weight": 0.215,
    "changed": {"pruned": 0.456, "recovered": 0.444},
    "mixtures": [
        {"layer": 0, "experts": 8, "kept": 6, "removed_weight": 0.1, "changed": {"pruned": 0.2, "recovered": 0.21}},
        {"layer": 2, "experts": 8, "kept": 6, "removed_weight": 0.33, "changed": {"pruned": 0.712, "recovered": 0.678}},
    ],
}
"""What became of the routing of a mixture of experts that was pruned and trained."""
RECOVERY: dict[str, Any] = {
    "params": Recover(method="full", text="another text", tokens=40_960).model_dump(mode="json"),
    "learning_rate": 1e-4,
    "text": "another text",
    "sequences": 100,
    "length": 256,
    "held_out": 16,
    "read_before": 0.25,
    "trained_parameters": 113_281_344,
    "steps": 40,
    "step": 40,
    "tokens": 40_960,
    "seconds": 192.0,
    "planned": 40,
    "curve": [
        {"step": 0, "tokens": 0, "seconds": 1.0, "loss": None, "held_out": 0.5},
        {"step": 10, "tokens": 10_240, "seconds": 48.0, "loss": 0.45, "held_out": None},
        {"step": 20, "tokens": 20_480, "seconds": 96.0, "loss": 0.4, "held_out": 0.4321},
        {"step": 40, "tokens": 40_960, "seconds": 192.0, "loss": 0.3, "held_out": 0.4},
    ],
    "held_out_before": 0.5,
    "held_out_after": 0.4,
}
"""A made-up training, as recover records it."""


def trained(**changes: Any) -> dict[str, Any]:
    """The evaluation with a recovered model, whose training differs from `RECOVERY` in some keys."""
    result = changed(
        recovered={
            "perplexity": 23.456,
            "perplexity_se": 0.333,
            "perplexity_ratio": {"value": 1.1309, "se": 0.0061},
            "draft": EVALUATION["pruned"]["draft"] | {"acceptance": 0.95, "tokens": 2, "speedup": 1.0805},
        },
        recovery=RECOVERY | changes,
    )
    result["tasks"]["piqa"]["recovered"] = {"acc": 0.65, "acc_se": 0.01, "acc_norm": 0.66, "acc_norm_se": 0.013}
    result["tasks"]["winogrande"]["recovered"] = {"acc": 0.53, "acc_se": 0.014}
    result["continuations"][0] |= {"recovered": "a riv", "agree_recovered": 2}
    return result


def changed(**sections: Any) -> dict[str, Any]:
    """The evaluation with some keys of some sections replaced."""
    result = copy.deepcopy(EVALUATION)
    for section, values in sections.items():
        both = isinstance(values, dict) and isinstance(result.get(section), dict)
        result[section] = result[section] | values if both else values
    return result


def report_of(result: dict[str, Any], pictures: list[Picture] = PICTURES, ratio: float | None = 12.34) -> str:
    """The report of a result."""
    return compose_report(result, LAYOUT, PROVENANCE, pictures, ratio)
