"""Rows of the vocabulary that a text never needs go from a model and its tokenizer."""
