"""Offline quickstart: a small pretrained encoder, a labelled data set, and the script that made both."""
