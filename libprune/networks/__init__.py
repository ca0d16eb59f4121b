"""Networks that are not transformers: any torch module with a family file of its own, through the same methods."""

from libprune import masks
from libprune.engine.module_family import NetworkFamily
from libprune.models.samples import Samples
from libprune.networks.network import Network
from libprune.repair.blocks import Epochs
from libprune.results.module_folder import Pruned, load

__all__ = ["Epochs", "Network", "NetworkFamily", "Pruned", "Samples", "load", "masks"]
