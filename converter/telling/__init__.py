"""What users are told: errors, quantities in words, results at a prompt, progress.

Depends on nothing; everything depends on it.
"""
