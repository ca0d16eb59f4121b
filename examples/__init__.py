"""Networks that are not transformers, pruned from beginning to end."""
