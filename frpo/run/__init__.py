"""One run: build its processes, check them, record metrics and samples, save, restore and restart the run."""
