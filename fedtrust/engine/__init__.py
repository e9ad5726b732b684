"""How a round is computed: seeds, cohorts, workers and the Flower grid."""
