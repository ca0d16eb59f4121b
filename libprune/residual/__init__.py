"""The width of the residual stream: who reads it, by which axes it is narrowed, and what makes good for that."""
