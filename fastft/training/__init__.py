"""Training: a session (one optimizer step at a time), the trainer behind `fastft train`, optimizers, accuracy."""
