"""A source as data: what components, shards and files a folder or a Hub repository has, and its classes' modules."""
