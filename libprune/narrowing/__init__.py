"""Measuring what a narrower residual stream costs."""
