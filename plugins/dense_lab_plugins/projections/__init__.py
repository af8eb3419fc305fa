"""Built-in projections of source streams."""
