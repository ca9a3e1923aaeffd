"""Programs that read converted snapshots: which components each takes in FP8, in which scheme, under which names."""
