"""Built-in patterns: which earlier layers a layer reads."""
