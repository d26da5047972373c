"""The command `rcmae` and what stands behind its small verbs."""
