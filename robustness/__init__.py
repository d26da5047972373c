"""Robustness benchmarks of trained models. Imports core, pretrain and transfer."""
