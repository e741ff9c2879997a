"""What a trained model has to know of its data: how rows become inputs, and what its outputs mean.

`format.py` has the whole of it, as a file of the model's folder holds it; `kinds.py` turns rows of files, tables and
lists into what a model takes, by the same functions as the data sets do it for training.
"""
