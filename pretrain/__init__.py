"""RC-MAE and MAE pretraining. Imports core only; its contract with transfer is the exported backbone directory."""
