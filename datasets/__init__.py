"""Data to train flows on. Every module is a ``datasets.base.DataModule``."""
