"""Complete small programs around libprune."""
