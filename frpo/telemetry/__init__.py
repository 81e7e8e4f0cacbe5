"""What is measured of a run and shown while it goes on: metrics, timers, progress."""
