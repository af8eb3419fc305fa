"""Built-in fusion operators."""
