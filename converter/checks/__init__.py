"""Is a converted snapshot what was written, and what its source gives?"""
