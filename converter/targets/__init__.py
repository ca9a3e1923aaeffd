"""Readers that a snapshot is written for: what each of them finds, under which names, and in which files."""
