"""Differential privacy: samplers, mechanisms, accountants and ledgers, so that what is claimed is what was done."""
