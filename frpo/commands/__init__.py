"""The commands of `frpo`: one file each, with the arguments that they share."""
