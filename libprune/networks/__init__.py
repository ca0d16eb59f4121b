"""Networks that are not transformers: any torch module with a family file of its own, through the same methods."""

from libprune.networks.family import NetworkFamily
from libprune.networks.network import Network
from libprune.networks.pruned import Pruned
from libprune.networks.slicing import load
from libprune.samples import Samples

__all__ = ["Network", "NetworkFamily", "Pruned", "Samples", "load"]
