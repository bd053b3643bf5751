"""A run of `eval.py`: its options, its folder, its images."""
