"""Comparisons with torch, transformers and TRL. They need the extra `parity`; see `conftest.py`."""
