"""Cross-entropy over the vocabulary; the gradient overwrites the logits."""
