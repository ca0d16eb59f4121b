"""From the masks of torch.nn.utils.prune to structure, and back, for models in memory."""

from libprune.masks.models import apply, extract, inspect

__all__ = ["apply", "extract", "inspect"]
