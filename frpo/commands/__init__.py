"""The commands of `frpo`, each in a file of its own, and a file with the arguments of all commands."""
