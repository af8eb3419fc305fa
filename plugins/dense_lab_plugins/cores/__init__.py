"""Built-in cores: sequence mixers."""
