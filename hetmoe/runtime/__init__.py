"""A deployment that is watched and changed while it runs."""
