"""What is done with every tensor, decided from names and shapes alone: manifests, rules, schedules, output files."""
