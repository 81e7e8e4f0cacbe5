"""One run: build its processes, check them, record what happens, save it, restore it, restart it."""
