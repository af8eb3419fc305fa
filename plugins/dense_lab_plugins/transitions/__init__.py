"""Built-in selective transitions."""
