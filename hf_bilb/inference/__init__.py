"""Using what a run has left: loading its folder (`load.py`), predicting and measuring (`loaded.py`,
`pixels.py`, `language.py`)."""
