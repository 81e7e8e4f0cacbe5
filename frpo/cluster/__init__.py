"""Ray: starts it, places learner ranks and engines as actors, and turns every death or time-out into a named error."""
