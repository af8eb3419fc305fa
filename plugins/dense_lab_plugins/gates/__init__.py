"""Built-in gates of selective transitions."""
