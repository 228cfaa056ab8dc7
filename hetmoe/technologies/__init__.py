"""One decision for every expert: analog, or digital at so many bits."""
