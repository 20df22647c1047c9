"""Models for other runtimes: a folder with the graph, what goes in and out, and a `run.py`."""

from zoo.export.bundle import Bundle as Bundle
from zoo.export.bundle import export_model as export_model
from zoo.export.engines import open_engine as open_engine

__all__ = ["Bundle", "export_model", "open_engine"]
