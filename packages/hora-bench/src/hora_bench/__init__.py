"""The experiments of the HoRA paper and real fine-tuning runs, on both backends."""

__version__ = "0.1.0"
