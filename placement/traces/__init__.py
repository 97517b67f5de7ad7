"""Traces: recorded and generated loads, on disk and as a stream."""
