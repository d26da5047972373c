"""Downstream tasks on an exported backbone. Imports core only, never pretrain."""
