"""fedtrust: an attack and defence simulator for federated learning."""
