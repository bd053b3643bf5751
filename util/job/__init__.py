"""The processes of a job: work that they share, signals, signs of life, progress."""
