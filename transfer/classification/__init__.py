"""From a backbone to a classifier: fine-tuning, linear probe, k-NN (spec classify)."""
