"""Models, losses and client optimisers."""
