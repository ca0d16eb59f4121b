"""Networks that are not transformers, as plain torch modules made of linear maps that libprune can prune."""
