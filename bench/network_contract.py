"""The contract of networks in figures: sliced against masked outputs, predicted against actual parameters.

    python -m bench.network_contract

Four random plans of every network of tests/support/networks.py, and of ResNet-18 in full width, all with random weights
and running statistics.
"""

from functools import partial

import torch

from libprune.engine import cost
from libprune.engine.describe_module import describe_module
from libprune.engine.surgery import masked
from libprune.networks import NetworkFamily
from libprune.report.markdown import markdown_table
from tests.support.networks import CASES, Case, ResNet, cut, random_plan, resnet_family

PLANS = 4
FULL = Case(
    partial(ResNet, (64, 128, 256, 512), classes=10),
    NetworkFamily(**resnet_family()),
    lambda n: torch.randn(n, 3, 32, 32),
    lambda n: torch.randint(10, (n,)),
)


def row(name: str, case: Case) -> tuple[object, ...]:
    network, inputs = case.network(), case.samples(8).inputs
    architecture = describe_module(network, case.family, inputs[:2])
    worst, alike = 0.0, 0
    for seed in range(PLANS):
        plan = random_plan(architecture, seed)
        smaller = cut(case, network, architecture, plan)
        with torch.no_grad():
            found = smaller(inputs)
            with masked(network, architecture, plan):
                expected = network(inputs)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
        alike += cost.size(architecture, plan).total == sum(p.numel() for p in smaller.parameters())
    return (
        name,
        f"{architecture.total_parameters:,}",
        str(len(architecture.parts)),
        f"{worst:.1e}",
        f"{alike} of {PLANS}",
    )


def main() -> None:
    rows = [row(name, case) for name, case in {**CASES, "resnet-18": FULL}.items()]
    header = ("network", "parameters", "prunable axes", "difference / largest output", "parameters as predicted")
    print(markdown_table(rows, header))


if __name__ == "__main__":
    main()
