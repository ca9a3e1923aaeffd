"""A finished snapshot on disk: files that can be trusted, the folder that holds them, and the record of it."""
