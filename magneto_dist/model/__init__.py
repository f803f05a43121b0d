"""Batch -> Prediction: plain modules that know neither data sets nor ranks."""
