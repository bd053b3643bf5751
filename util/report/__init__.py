"""The page that `reproduce.py` draws from run folders, beside the published figures."""
