"""The page that `report.py` makes of the results."""
