"""Start Ray, place learner ranks and engines as actors, and turn every death or time-out into a named error."""
