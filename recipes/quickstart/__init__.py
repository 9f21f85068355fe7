"""Offline quickstart: a small pretrained encoder, a labelled data set, and what made both."""
