"""Trained models as ONNX: translated (`graph.py`), compared with torch (`check.py`), written (`export.py`)."""
