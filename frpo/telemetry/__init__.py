"""Measure a run and show its progress: metrics, timers, progress bar and lines."""
