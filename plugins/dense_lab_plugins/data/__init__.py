"""Built-in sources of tokens."""
