"""Training of small models: the loop, the data, the classifier behind their scores."""
