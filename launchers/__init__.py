"""Start a run on other machines: one file for each way. frpo itself imports none of these files."""
