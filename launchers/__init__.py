"""Ways to start a run elsewhere than here, one file each. frpo itself imports none of them."""
