"""From records to the batches of a training step."""
