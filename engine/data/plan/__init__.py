"""Which examples a run reads, in which order, with which random choices: pure functions of the seed."""
